"""How far mechanisms are from exact attention in the layers of a model, and why: measured on what the layers see."""
