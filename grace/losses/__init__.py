"""The distillation losses and their controller, with the signatures of the authors' code."""

from grace.losses.controller import AdaptiveIBController
from grace.losses.gated_dkd import gated_dkd_loss
from grace.losses.rcka import rcka_loss

__all__ = ["AdaptiveIBController", "gated_dkd_loss", "rcka_loss"]
