"""Ingredients of `opensora-perflow demo`: small real clips, a tiny VAE, a tiny text encoder and a tiny STDiT3 teacher.

The pieces meet the same calls as Open-Sora's own (HOST contract: vae.encode / decode, text_encoder.encode / null, the
STDiT3 forward), so the demo runs the package's real scheduler and nothing here knows that it is a toy.
"""
