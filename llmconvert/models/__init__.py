"""Models for training and inference, and what helps to train them."""
