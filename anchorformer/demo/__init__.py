"""What a trained model sees and says, in a browser on this machine: `python -m anchorformer.demo`."""
