"""Models whose parameters are spread over processes: PyTorch's FSDP2 and FSDP1, and DeepSpeed's ZeRO-3.

These three do the communication. Here is what has to be known of them: in whose call a parameter is whole
(:mod:`.calling`), what it is meanwhile and at rest (:mod:`.fsdp2`, :mod:`.fsdp1`, :mod:`.zero`), and whether it is
whole where somebody wants to read it outside a forward (:mod:`.whole`).
"""
