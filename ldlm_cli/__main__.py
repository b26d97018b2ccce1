"""`python -m ldlm_cli`: what `--num-processes`, torchrun and accelerate launch start."""

from ldlm_cli.cli.app import main

if __name__ == "__main__":
    main()
