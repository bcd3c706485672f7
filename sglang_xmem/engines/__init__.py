"""Adapters: one package per inference engine."""
