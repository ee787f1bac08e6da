"""The first configuration of somebody who has a model and images."""
