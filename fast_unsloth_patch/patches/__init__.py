"""Forwards that replace Hugging Face's and PEFT's."""
