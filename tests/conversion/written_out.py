"""The published models written out in float64: from raw tensors and a raw `config.json` to logits, nothing shared.

Loops and plain products only, one sequence at a time. Every choice that a reader of the published files could get
wrong is a field of `Choices`, so that a test can make the wrong one and see by how much the logits move.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from tests.conversion.published import GQA_LAYOUTS

NEVER = -math.inf


@dataclass(frozen=True)
class Choices:
    """How the published models compute; the defaults hold for all of them, the first four fields per layout."""

    projector_norm: str = "post_merge"
    clip_attention: bool = False
    clip_positions: bool = False
    axes: int = 3
    # vision tower and projector
    tower_eps: float = 1e-6
    tower_gelu: str = "tanh"
    projector_eps: float = 1e-5
    projector_gelu: str = "none"
    merge: str = "rows"
    align_corners: bool = False
    resize: str = "bilinear"
    antialias: bool = False
    vision_theta: float = 10000.0
    vision_frequencies: str = "rows then columns"
    vision_exponent: float = 1.0
    images_attend: str = "each alone"
    # positions
    truncate_time: bool = True
    after_block: str = "maximum"
    # decoder
    sections: str = "contiguous"
    rope_pairs: str = "halves"
    gate_first: bool = True
    gate_up: str = "halves"
    softmax_over: str = "all experts"
    router_weights: str = "unbiased"
    group_score: str = "two best"
    excluded: float = NEVER
    scale_before_normalising: bool = False
    # indexers
    index_gates: str = "last rows"
    index_q_norm: str = "rms"
    index_k_norm: str = "layer"
    index_k_bias: bool = True
    index_input: str = "normed layer input"
    index_rotary: str = "own"
    index_eps: float = 1e-6
    index_gate_function: str = "raw"
    index_relu: bool = True
    index_masked: float = NEVER
    index_sets: str = "one"
    index_pairs: str = "halves"
    index_rotated: str = "first"
    # latent attention
    mla_pairs: str = "neighbours"
    mla_temperature: str = "in the scale"
    kv_norm_over: str = "latent"


def choices_of(layout: str, **wrong) -> Choices:
    """What the layout's model does, with the fields of `wrong` replaced."""
    preview = layout == "keye_vl_preview"
    return replace(
        Choices(
            projector_norm="pre_merge" if preview else "post_merge",
            clip_attention=preview,
            clip_positions=preview,
            axes=3 if layout in GQA_LAYOUTS else 1,
        ),
        **wrong,
    )


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turn_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [L, heads, d], angles [L, d/2]: element i turns with element i + d/2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def turn_neighbours(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [L, heads, d], angles [L, d/2]: element 2i turns with element 2i + 1."""
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


TURNS = {"halves": turn_halves, "neighbours": turn_neighbours}


def frequencies(theta: float, dim: int) -> torch.Tensor:
    return torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)


class WrittenOut:
    """One published checkpoint; `tensors` are what the weights mean (see `published.dequantised`)."""

    def __init__(self, layout: str, config: dict, tensors: dict[str, torch.Tensor], choices: Choices | None = None):
        self.config, self.layout = config, layout
        self.choices = choices or choices_of(layout)
        self.w = {name: tensor.double() for name, tensor in tensors.items()}
        # Of every selection made: the smallest relative distance between the last token taken and the first one not.
        self.margin = math.inf
        self.selected: list[list[torch.Tensor]] = []

    # Vision: patches [N, 3, P, P] in raster order, grid rows (frames, height, width) in patches.

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def _norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        return layer_norm(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def _table(self, height: int, width: int) -> torch.Tensor:
        """The learned positions resized to [height * width, hidden]."""
        table = self.w["visual.vision_model.embeddings.position_embedding.weight"]
        side = math.isqrt(table.shape[0])
        table = table.view(side, side, -1)
        if self.choices.resize != "bilinear" or self.choices.antialias:
            options = {"mode": self.choices.resize, "antialias": self.choices.antialias, "align_corners": False}
            grid = F.interpolate(table.permute(2, 0, 1)[None], size=(height, width), **options)
            return grid[0].flatten(1).T

        def taps(size: int) -> torch.Tensor:  # [size, side]: two neighbours per place, clamped at the border
            matrix = torch.zeros(size, side, dtype=torch.float64)
            for i in range(size):
                place = (i + 0.5) * side / size - 0.5
                if self.choices.align_corners:
                    place = i * (side - 1) / (size - 1)
                place = min(max(place, 0.0), side - 1.0)
                low = int(place)
                matrix[i, low] += 1 - (place - low)
                matrix[i, min(low + 1, side - 1)] += place - low
            return matrix

        return torch.einsum("ya,xb,abd->yxd", taps(height), taps(width), table).flatten(0, 1)

    def _vision_angles(self, height: int, width: int, dim: int) -> torch.Tensor:
        """[height * width, dim / 2]: row times each frequency, then column times each frequency."""
        c = self.choices
        step = frequencies(c.vision_theta, dim // 2) ** c.vision_exponent
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        rows, columns = rows.flatten()[:, None] * step, columns.flatten()[:, None] * step
        if c.vision_frequencies == "interleaved":
            return torch.stack([rows, columns], dim=-1).flatten(1)
        return torch.cat([columns, rows] if c.vision_frequencies == "columns first" else [rows, columns], dim=1)

    def tower(self, pixels: torch.Tensor, grid: list[list[int]], video: bool = False) -> torch.Tensor:
        """Features [N, hidden] after the last norm."""
        c, vision, root = self.choices, self.config["vision_config"], "visual.vision_model"
        heads = vision["num_attention_heads"]
        dim = vision["hidden_size"] // heads
        kernel = self.w[f"{root}.embeddings.patch_embedding.weight"].flatten(1)
        x = pixels.double().flatten(1) @ kernel.T + self.w[f"{root}.embeddings.patch_embedding.bias"]
        positions, angles, segments = [], [], []
        for t, h, w in grid:
            positions += [self._table(h, w)] * t
            angles += [self._vision_angles(h, w, dim)] * t
            segments += [t * h * w] if c.clip_attention and video else [h * w] * t
        if c.images_attend == "all together":
            segments = [sum(segments)]
        x = x + torch.cat(positions)
        angles = torch.cat(angles)
        for i in range(vision["num_hidden_layers"]):
            layer = f"{root}.encoder.layers.{i}"
            normed = self._norm(x, f"{layer}.layer_norm1", c.tower_eps)
            q, k, v = (
                self._linear(normed, f"{layer}.self_attn.{part}_proj").unflatten(-1, (heads, dim)) for part in "qkv"
            )
            q, k = turn_halves(q, angles), turn_halves(k, angles)
            parts = []
            for qs, ks, vs in zip(q.split(segments), k.split(segments), v.split(segments)):
                weights = (torch.einsum("qhd,khd->hqk", qs, ks) * dim**-0.5).softmax(dim=-1)
                parts.append(torch.einsum("hqk,khd->qhd", weights, vs))
            x = x + self._linear(torch.cat(parts).flatten(1), f"{layer}.self_attn.out_proj")
            inner = self._linear(self._norm(x, f"{layer}.layer_norm2", c.tower_eps), f"{layer}.mlp.fc1")
            x = x + self._linear(F.gelu(inner, approximate=c.tower_gelu), f"{layer}.mlp.fc2")
        return self._norm(x, f"{root}.post_layernorm", c.tower_eps)

    def projector(self, features: torch.Tensor, grid: list[list[int]]) -> torch.Tensor:
        """Tokens [N / 4, hidden of the decoder]."""
        c, size = self.choices, self.config["vision_config"]["spatial_merge_size"]
        if c.projector_norm == "pre_merge":
            features = self._norm(features, "mlp_AR.pre_norm", c.projector_eps)
        tokens, start = [], 0
        for t, h, w in grid:
            for _ in range(t):
                frame = features[start : start + h * w].view(h, w, -1)
                start += h * w
                for row in range(0, h, size):
                    for column in range(0, w, size):
                        block = frame[row : row + size, column : column + size]
                        tokens.append((block.transpose(0, 1) if c.merge == "columns" else block).reshape(-1))
        merged = torch.stack(tokens)
        if c.projector_norm == "post_merge":
            merged = self._norm(merged, "mlp_AR.pre_norm", c.projector_eps)
        hidden = F.gelu(self._linear(merged, "mlp_AR.linear_1"), approximate=c.projector_gelu)
        return self._linear(hidden, "mlp_AR.linear_2")

    # Positions.

    def positions(
        self,
        ids: list[int],
        images: list[list[int]] = (),
        videos: list[list[int]] = (),
        seconds: list[float] | None = None,
    ) -> torch.Tensor:
        """[3, L]: text counts on all axes, a block of visual tokens spreads over time, rows and columns."""
        c, config = self.choices, self.config
        if c.axes == 1:
            return torch.arange(len(ids)).expand(3, -1)
        blocks = {
            config["image_token_id"]: [([0], h // 2, w // 2) for _, h, w in images],
            config["video_token_id"]: [],
        }
        for number, (t, h, w) in enumerate(videos):
            if c.clip_positions:
                spacing = 1.0 if seconds is None else seconds[number]
                scale = spacing * config["vision_config"]["tokens_per_second"]
                times = [math.floor(k * scale) if c.truncate_time else round(k * scale) for k in range(t)]
                blocks[config["video_token_id"]].append((times, h // 2, w // 2))
            else:
                blocks[config["video_token_id"]] += [([0], h // 2, w // 2)] * t
        axes: list[tuple[int, int, int]] = []
        following = 0
        while len(axes) < len(ids):
            waiting = blocks.get(ids[len(axes)])
            if not waiting:
                axes.append((following,) * 3)
                following += 1
                continue
            times, rows, columns = waiting.pop(0)
            axes += [
                (following + t, following + r, following + s)
                for t in times
                for r in range(rows)
                for s in range(columns)
            ]
            largest = max(max(times), rows - 1, columns - 1)
            following += 1 + (max(times) if c.after_block == "time" else largest)
        assert len(axes) == len(ids) and not any(blocks.values())
        return torch.tensor(axes).T

    # Decoder.

    def angles(self, positions: torch.Tensor, dim: int, theta: float, sections: list[int] | None) -> torch.Tensor:
        """[L, dim / 2]."""
        step = frequencies(theta, dim)
        if sections is None:
            return positions[0].double()[:, None] * step
        axis = [a for a, count in enumerate(sections) for _ in range(count)]
        if self.choices.sections == "interleaved":  # T H W T H W ..., as Qwen3-VL; what is left over is time
            axis = [0] * (dim // 2)
            for a in (1, 2):
                for i in range(a, 3 * sections[a], 3):
                    if i < len(axis):
                        axis[i] = a
        assert len(axis) == dim // 2
        return positions[axis].double().T * step

    def yarn(self) -> tuple[torch.Tensor, float]:
        """Frequencies of the 1-D rotary embedding and m^2 of the softmax scale."""
        config, rope = self.config, self.config["rope_scaling"]
        dim, theta = config["qk_rope_head_dim"], config["rope_theta"]
        plain = frequencies(theta, dim)
        if rope is None:
            return plain, 1.0

        def place(rotations: float) -> float:
            reach = rope["original_max_position_embeddings"] / (rotations * 2 * math.pi)
            return dim * math.log(reach) / (2 * math.log(theta))

        low = max(math.floor(place(rope["beta_fast"])), 0)
        high = min(math.ceil(place(rope["beta_slow"])), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
        m = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1
        return plain / rope["factor"] * ramp + plain * (1 - ramp), m * m

    def select(self, scores: torch.Tensor, topk: int) -> torch.Tensor:
        """scores [L, L] -> which keys each query reads; of equal scores the first ones."""
        length = scores.shape[0]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        masked = scores.masked_fill(future, self.choices.index_masked)
        kept = torch.zeros(length, length, dtype=torch.bool)
        for t in range(length):
            order = masked[t].sort(descending=True, stable=True)
            kept[t, order.indices[:topk]] = True
            if t >= topk:
                gap = float(order.values[topk - 1] - order.values[topk])
                if gap > 0:
                    self.margin = min(self.margin, gap / float(scores[t, : t + 1].abs().max()))
        return kept & ~future

    def _attend(self, q, k, v, scale: float, kept: torch.Tensor | None) -> torch.Tensor:
        """q [L, H, d], k [L, G, d], v [L, G, dv] -> [L, H * dv]."""
        length, heads, groups = q.shape[0], q.shape[1], k.shape[1]
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = allowed if kept is None else allowed & kept
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, NEVER).softmax(dim=-1), v).flatten(1)

    def _gqa(self, x: torch.Tensor, residual: torch.Tensor, name: str, positions: torch.Tensor) -> torch.Tensor:
        config, c = self.config, self.choices
        dim, eps, theta = config["head_dim"], config["rms_norm_eps"], config["rope_theta"]
        sections = config["rope_scaling"]["mrope_section"]
        q, k, v = ((x @ self.w[f"{name}.{part}_proj.weight"].T).unflatten(-1, (-1, dim)) for part in "qkv")
        q = rms_norm(q, self.w[f"{name}.q_norm.weight"], eps)
        k = rms_norm(k, self.w[f"{name}.k_norm.weight"], eps)
        angles = self.angles(positions, dim, theta, sections)
        q, k = TURNS[c.rope_pairs](q, angles), TURNS[c.rope_pairs](k, angles)
        kept = None
        if "sa_config" in config:
            source = residual if c.index_input == "residual" else x
            scores = self._keye_scores(source, f"{name}.sa_indexer", positions, angles)
            topk = config["sa_config"].get("topk", 2048)
            if c.index_sets == "per group":
                groups = config["num_key_value_heads"]
                kept = [self.select(part.sum(dim=0), topk) for part in scores.tensor_split(groups)]
                kept = torch.stack(kept).repeat_interleave(config["num_attention_heads"] // groups, dim=0)
            else:
                kept = self.select(scores.sum(dim=0), topk)
                self.selected.append([row.nonzero().squeeze(-1) for row in kept])
        return self._attend(q, k, v, dim**-0.5, kept) @ self.w[f"{name}.o_proj.weight"].T

    def _keye_scores(self, x, name: str, positions: torch.Tensor, main_angles: torch.Tensor) -> torch.Tensor:
        """[index heads, L, L]: what each head of the Keye-VL-2.0 indexer adds to the score of (query, key)."""
        config, c = self.config, self.choices
        heads, dim = config["sa_config"].get("indexer_num_heads", 4), config["sa_config"].get("indexer_head_dim", 128)
        u = x @ self.w[f"{name}.q_proj.weight"].T
        if c.index_gates == "per head":
            u = u.unflatten(-1, (heads, dim + 1))
            q, gates = u[..., :dim], u[..., dim]
        elif c.index_gates == "first rows":
            gates, q = u[:, :heads], u[:, heads:].unflatten(-1, (heads, dim))
        else:
            q, gates = u[:, : heads * dim].unflatten(-1, (heads, dim)), u[:, heads * dim :]
        k = x @ self.w[f"{name}.k_proj.weight"].T
        weight, k_weight = self.w[f"{name}.q_norm.weight"], self.w[f"{name}.k_norm.weight"]
        bias = self.w[f"{name}.k_norm.bias"] * c.index_k_bias
        if c.index_q_norm == "layer":
            q = layer_norm(q, weight, 0.0, c.index_eps)
        else:
            q = rms_norm(q, weight, c.index_eps)
        if c.index_k_norm == "rms":
            k = rms_norm(k, k_weight, c.index_eps) + bias
        else:
            k = layer_norm(k, k_weight, bias, c.index_eps)
        scaled = [int(n * dim / config["head_dim"]) for n in config["rope_scaling"]["mrope_section"]]
        angles = self.angles(positions, dim, config["rope_theta"], scaled)
        if c.index_rotary == "slice of the main one":
            angles = main_angles[:, : dim // 2]
        elif c.index_rotary == "first axis":
            angles = self.angles(positions, dim, config["rope_theta"], None)
        turn = TURNS[c.index_pairs]
        if c.index_rotary == "half of the dimensions":
            half = self.angles(positions, dim // 2, config["rope_theta"], None)
            q, k = (
                torch.cat([turn(y[..., : dim // 2], half), y[..., dim // 2 :]], dim=-1) for y in (q, k.unsqueeze(1))
            )
            k = k.squeeze(1)
        else:
            q, k = turn(q, angles), turn(k.unsqueeze(1), angles).squeeze(1)
        gates = {"raw": gates, "sigmoid": gates.sigmoid(), "softmax": gates.softmax(dim=-1)}[c.index_gate_function]
        products = torch.einsum("qhd,kd->hqk", q, k)
        return (products.relu() if c.index_relu else products) * gates.T[:, :, None] * dim**-0.5

    def _mla(self, x: torch.Tensor, name: str, positions: torch.Tensor) -> torch.Tensor:
        config, c = self.config, self.choices
        nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        latent_size = config["kv_lora_rank"]
        step, temperature = self.yarn()
        angles = positions[0].double()[:, None] * step
        query_latent = None
        if config["q_lora_rank"] is None:
            q = x @ self.w[f"{name}.q_proj.weight"].T
        else:
            query_latent = rms_norm(
                x @ self.w[f"{name}.q_a_proj.weight"].T, self.w[f"{name}.q_a_layernorm.weight"], 1e-6
            )
            q = query_latent @ self.w[f"{name}.q_b_proj.weight"].T
        q_nope, q_rope = q.unflatten(-1, (-1, nope + rope)).split([nope, rope], dim=-1)
        kv = x @ self.w[f"{name}.kv_a_proj_with_mqa.weight"].T
        weight = self.w[f"{name}.kv_a_layernorm.weight"]
        latent, k_rope = kv.split([latent_size, rope], dim=-1)
        if c.kv_norm_over == "everything":
            both = rms_norm(kv, torch.cat([weight, torch.ones(rope, dtype=torch.float64)]), 1e-6)
            latent, k_rope = both.split([latent_size, rope], dim=-1)
        else:
            latent = rms_norm(latent, weight, 1e-6)
        expanded = (latent @ self.w[f"{name}.kv_b_proj.weight"].T).unflatten(-1, (-1, nope + value))
        k_nope, v = expanded.split([nope, value], dim=-1)
        turn = TURNS[c.mla_pairs]
        factor = temperature**0.5 if c.mla_temperature == "in cos and sin too" else 1.0
        q_rope, k_rope = turn(q_rope, angles) * factor, turn(k_rope.unsqueeze(1), angles) * factor
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, k_nope.shape[1], -1)], dim=-1)
        scale = (nope + rope) ** -0.5 * (1.0 if c.mla_temperature == "left out" else temperature)
        kept = None
        if "index_topk" in config:
            kept = self.select(self.deepseek_scores(x, query_latent, f"{name}.indexer", angles), config["index_topk"])
            self.selected.append([row.nonzero().squeeze(-1) for row in kept])
        return self._attend(q, k, v, scale, kept) @ self.w[f"{name}.o_proj.weight"].T

    def deepseek_scores(self, x, query_latent, name: str, angles: torch.Tensor) -> torch.Tensor:
        """[L, L]: the scores of the DeepSeek-V3.2 indexer."""
        config, c = self.config, self.choices
        heads, dim, rope = config["index_n_heads"], config["index_head_dim"], config["qk_rope_head_dim"]
        q = (query_latent @ self.w[f"{name}.wq_b.weight"].T).unflatten(-1, (heads, dim))
        k = x @ self.w[f"{name}.wk.weight"].T
        k = layer_norm(k, self.w[f"{name}.k_norm.weight"], self.w[f"{name}.k_norm.bias"] * c.index_k_bias, c.index_eps)

        def rotated(y):
            if c.index_rotated == "last":
                return torch.cat([y[..., : dim - rope], TURNS[c.index_pairs](y[..., dim - rope :], angles)], dim=-1)
            return torch.cat([TURNS[c.index_pairs](y[..., :rope], angles), y[..., rope:]], dim=-1)

        q, k = rotated(q), rotated(k.unsqueeze(1)).squeeze(1)
        gates = (x @ self.w[f"{name}.weights_proj.weight"].T) * (heads * dim) ** -0.5
        return torch.einsum("qhk,qh->qk", torch.einsum("qhd,kd->qhk", q, k).relu(), gates)

    def _swiglu(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gate, up = (x @ self.w[f"{name}.{part}_proj.weight"].T for part in ("gate", "up"))
        return (F.silu(gate) * up) @ self.w[f"{name}.down_proj.weight"].T

    def _softmax_experts(self, x: torch.Tensor, name: str) -> torch.Tensor:
        config, c = self.config, self.choices
        scores = (x @ self.w[f"{name}.gate.weight"].T).softmax(dim=-1)
        weights, chosen = scores.topk(config["num_experts_per_tok"], dim=-1)
        if c.softmax_over != "all experts, not renormalised":
            weights = weights / weights.sum(dim=-1, keepdim=True)
        output = torch.zeros_like(x)
        for e in range(config["num_experts"]):
            tokens, places = torch.where(chosen == e)
            output[tokens] += weights[tokens, places, None] * self._expert(x[tokens], name, e)
        return output

    def _expert(self, x: torch.Tensor, name: str, e: int) -> torch.Tensor:
        """One expert, whichever way it is stored."""
        if f"{name}.experts.gate_up_proj" not in self.w:
            return self._swiglu(x, f"{name}.experts.{e}")
        both = x @ self.w[f"{name}.experts.gate_up_proj"][e]  # stored as [E, in, 2 inner] and [E, inner, out]
        gate, up = both.chunk(2, dim=-1)
        if self.choices.gate_up == "interleaved":
            gate, up = both[:, 0::2], both[:, 1::2]
        if not self.choices.gate_first:
            gate, up = up, gate
        return (F.silu(gate) * up) @ self.w[f"{name}.experts.down_proj"][e]

    def _sigmoid_experts(self, x: torch.Tensor, name: str) -> torch.Tensor:
        config, c = self.config, self.choices
        scores = (x @ self.w[f"{name}.gate.weight"].T).sigmoid()
        biased = scores + self.w[f"{name}.gate.e_score_correction_bias"]
        groups = biased.unflatten(-1, (config["n_group"], -1))
        best = groups.amax(dim=-1) if c.group_score == "best" else groups.topk(2, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(best).scatter(-1, best.topk(config["topk_group"], dim=-1).indices, 1.0).bool()
        choice = groups.masked_fill(~kept.unsqueeze(-1), c.excluded).flatten(-2)
        chosen = choice.topk(config["num_experts_per_tok"], dim=-1).indices
        weights = (biased if c.router_weights == "biased" else scores).gather(-1, chosen)
        if config["norm_topk_prob"]:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if not c.scale_before_normalising:
            weights = weights * config["routed_scaling_factor"]
        output = self._swiglu(x, f"{name}.shared_experts") if config["n_shared_experts"] else torch.zeros_like(x)
        for e in range(config["n_routed_experts"]):
            tokens, places = torch.where(chosen == e)
            output[tokens] += weights[tokens, places, None] * self._expert(x[tokens], name, e)
        return output

    def _feed_forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if f"{name}.gate.e_score_correction_bias" in self.w:
            return self._sigmoid_experts(x, name)
        return self._softmax_experts(x, name) if f"{name}.gate.weight" in self.w else self._swiglu(x, name)

    def logits(
        self,
        ids: list[int],
        *,
        positions: torch.Tensor | None = None,
        pixels: torch.Tensor | None = None,
        image_grid: list[list[int]] = (),
        video_pixels: torch.Tensor | None = None,
        video_grid: list[list[int]] = (),
        seconds: list[float] | None = None,
    ) -> torch.Tensor:
        """[L, vocabulary] of one unpadded prompt."""
        config = self.config
        x = self.w["model.embed_tokens.weight"][torch.tensor(ids)].clone()
        media = ((pixels, image_grid, "image", False), (video_pixels, video_grid, "video", True))
        for values, grid, kind, video in media:
            if values is not None:
                places = torch.tensor(ids) == config[f"{kind}_token_id"]
                x[places] = self.projector(self.tower(values, grid, video), grid)
        if positions is None:
            positions = self.positions(ids, image_grid, video_grid, seconds)
        eps = config["rms_norm_eps"]
        for i in range(config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            normed = rms_norm(x, self.w[f"{layer}.input_layernorm.weight"], eps)
            if self.layout in GQA_LAYOUTS:
                x = x + self._gqa(normed, x, f"{layer}.self_attn", positions)
            else:
                x = x + self._mla(normed, f"{layer}.self_attn", positions)
            x = x + self._feed_forward(
                rms_norm(x, self.w[f"{layer}.post_attention_layernorm.weight"], eps), f"{layer}.mlp"
            )
        return rms_norm(x, self.w["model.norm.weight"], eps) @ self.w["lm_head.weight"].T
