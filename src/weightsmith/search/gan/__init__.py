"""Architectures of generative adversarial networks: EAGAN's search spaces, networks, losses and scores."""

from weightsmith.search.gan.discriminator import Discriminator, SimpleDiscriminator
from weightsmith.search.gan.generator import Generator

__all__ = ["Discriminator", "Generator", "SimpleDiscriminator"]
