"""Train an image classifier: `python train.py`, or `python train.py --config configs/resnet56_cifar10.yaml`."""

from nm_lightning.cli.train import main

if __name__ == "__main__":
    main()
