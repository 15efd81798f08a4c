"""CIFAR-10 in seconds on one GPU: python -m train.fast.

After airbench by Keller Jordan (2024), 94% on CIFAR-10 in 3.29 Seconds on a
Single GPU, arXiv:2404.00498; code at github.com/KellerJordan/cifar10-airbench.
"""
