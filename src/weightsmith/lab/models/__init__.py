"""Small reference models and named lookup: our own, Hugging Face ids or folders, and ``module:function``."""

from weightsmith.lab.models.lookup import build_model as build_model
