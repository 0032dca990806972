"""Every method from one SFT model on the same pairs, and plain SFT on the chosen responses as the floor.

Each method's learning rate is the best of the same few, by a held-out metric on one half of what is held out;
the other half is reported.
"""
