"""How features flow through a trained U-Net: figures of each level, what each part contributes, how far it sees."""
