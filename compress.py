"""Make a trained network smaller without retraining: `python compress.py --method merge --ratio 0.5`."""

from nm_lightning.cli.compress import main

if __name__ == "__main__":
    main()
