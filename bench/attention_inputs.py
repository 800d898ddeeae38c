"""What the attentions of a torch model are given, and models at lengths that they were not trained at."""

from unittest import mock


def taken(module, *inputs) -> list[tuple]:
    """(query, key, value) of every scaled_dot_product_attention of one forward pass, (batch, heads, n, head_size) each; a
    scale other than 1 / sqrt(head_size) is folded into the queries.

    Raises:
        ValueError: the model did not call it.
    """
    import torch

    exact = torch.nn.functional.scaled_dot_product_attention
    sites = []

    def attention(query, key, value, *rest, scale=None, **options):
        head_scale = query.shape[-1] ** -0.5
        sites.append((query * ((head_scale if scale is None else scale) / head_scale), key, value))
        return exact(query, key, value, *rest, scale=scale, **options)

    with torch.no_grad(), mock.patch("torch.nn.functional.scaled_dot_product_attention", attention):
        module(*inputs)
    if not sites:
        raise ValueError("the model did not call scaled_dot_product_attention; load it with attn_implementation='sdpa'")
    return sites


def stretch_positions(bert, n: int) -> None:
    """Give a BERT of transformers `n` positions, its embeddings of them interpolated linearly, where it has fewer."""
    import torch

    embeddings = bert.embeddings
    if n <= embeddings.position_embeddings.num_embeddings:
        return
    table = embeddings.position_embeddings.weight.detach()
    stretched = torch.nn.functional.interpolate(table.T[None], size=n, mode="linear", align_corners=True)[0].T
    embeddings.position_embeddings = torch.nn.Embedding.from_pretrained(stretched.contiguous())
    device = table.device
    embeddings.register_buffer("position_ids", torch.arange(n, device=device)[None], persistent=False)
    embeddings.register_buffer("token_type_ids", torch.zeros(1, n, dtype=torch.long, device=device), persistent=False)
    bert.config.max_position_embeddings = n


def stretch_rotary(llama, n: int) -> None:
    """Divide the rotary angles of a Llama of transformers so that `n` positions span those that it was trained for."""
    rotary = llama.rotary_emb
    rotary.inv_freq = rotary.inv_freq / max(1.0, n / llama.config.max_position_embeddings)
