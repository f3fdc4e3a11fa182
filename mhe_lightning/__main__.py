"""`python -m mhe_lightning fit --config …`: the same as the `mhe` command."""

from mhe_lightning.cli import main

if __name__ == "__main__":
    main()
