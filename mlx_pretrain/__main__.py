"The command `mlx-pretrain`, or `python -m mlx_pretrain`: signal handlers first, then the large imports."
import sys

from mlx_pretrain.console import run_process


def main(
    args: list[str] | None = None, # command-line words; by default those of this process
) -> int: # exit code
    "Run `cli.main` as all that this process does."
    def command():
        from mlx_pretrain import cli
        return cli.main(args)
    return run_process(command)


if __name__ == "__main__": sys.exit(main())
