"""Every method from one SFT model on the same pairs, and plain SFT on the chosen responses as the floor."""
