"""Everything that knows Open-Sora: how its networks are called, conditioned, wrapped and warped. Nothing else does."""
