"""What can be done to a volume: MONAI transforms, values in, values out."""
