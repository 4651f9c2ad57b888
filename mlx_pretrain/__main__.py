"The command `mlx-pretrain`, or `python -m mlx_pretrain`: signal handlers first, then the large imports."
import sys

from mlx_pretrain.console import exit_if_stopped, handle_signals, ignore_signals


def main(
    args: list[str] | None = None, # command-line words; by default those of this process
) -> int: # exit code
    "Run a command as all that this process does; `cli.main` does so without handling signals."
    signals = handle_signals()
    try:
        from mlx_pretrain.cli import running
        with running(args) as run: run.command(run.args)
        return run.code
    except BaseException as error:
        exit_if_stopped(error)
        raise
    finally: ignore_signals(signals)


if __name__ == "__main__": sys.exit(main())
