"The command `mlx-pretrain`, or `python -m mlx_pretrain`: signal handlers first, then the large imports."
import sys

from mlx_pretrain.console import exit_if_stopped, handle_signals, ignore_signals


def main(
    args: list[str] | None = None, # command-line words; by default those of this process
) -> int: # exit code
    "Run `cli.main` as all that this process does."
    signals = handle_signals()
    try:
        from mlx_pretrain import cli
        return cli.main(args)
    except BaseException as error:
        exit_if_stopped(error)
        raise
    finally: ignore_signals(signals)


if __name__ == "__main__": sys.exit(main())
