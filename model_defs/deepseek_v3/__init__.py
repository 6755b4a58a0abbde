"""DeepSeek-V2, V3, R1, Kimi-K2 and Moonlight: latent attention, shared and routed experts."""
