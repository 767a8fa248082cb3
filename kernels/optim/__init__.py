"""Optimiser steps in one pass: clipping, Adan or AdamW, master weights and moving averages together."""

from .op import adamw_step, adan_step, grad_norm, grad_sumsq

__all__ = ["adamw_step", "adan_step", "grad_norm", "grad_sumsq"]
