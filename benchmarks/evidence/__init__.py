"""What a cut without training keeps of a pretrained model, against rivals, on your photos."""
