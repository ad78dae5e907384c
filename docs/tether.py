"""The double clip and the mask as a picture: the guider's loss and its gradient against log(mu /
pi), drawn with the functions of magpo_ff.py, for several delta.

    python docs/tether.py
    python docs/tether.py --deltas 1.5 inf --advantage -1 --out other.png

One agent has two actions and takes the first, which the learner takes with probability pi. Each
column has another mu_old: the guider collected its data at the learner, a bit away from it, or far
outside of the tether. The program also prints one point of the last column.
"""
import dataclasses
import math
import os
import sys
from typing import Tuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import seaborn as sns
import tyro

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import magpo_ff  # noqa: E402


@dataclasses.dataclass
class Options:
    deltas: Tuple[float, ...] = (1.1, 1.5, 3.0, math.inf)  # lengths of the tether; inf: none
    learner_prob: float = 0.1  # pi of the action taken
    behaviour_probs: Tuple[float, ...] = (0.1, 0.14, 0.5)  # mu_old of the action taken, a column
    advantage: float = 1.0  # A of the action taken
    clip_coef: float = 0.2  # PPO's epsilon
    point: Tuple[float, float] = (0.3, 1.5)  # mu and delta of the point that is printed
    out: str = "runs/tether.png"  # PNG to write


def policy(log_prob: jax.Array) -> magpo_ff.distrax.Categorical:
    """Two actions, of which the first has this log-probability."""
    return magpo_ff.distrax.Categorical(jnp.stack([log_prob, jnp.log1p(-jnp.exp(log_prob))]))


def losses(options: Options, guider_log_prob, behaviour_prob, delta) -> Tuple:
    """The two terms of Eq. 9 for one sample, as in `minibatch_loss`: PPO with the double clip, and
    the masked KL."""
    learner_log_prob = jnp.log(options.learner_prob)
    behaviour_log_prob = jnp.log(behaviour_prob)
    ratio = jnp.exp(guider_log_prob - behaviour_log_prob)
    clipped_ratio = magpo_ff.double_clip(
        guider_log_prob, learner_log_prob, behaviour_log_prob, delta, options.clip_coef)
    ppo = magpo_ff.ppo_loss(ratio, clipped_ratio, options.advantage)
    mask = jnp.abs(guider_log_prob - learner_log_prob) > jnp.log(delta)
    kl = mask * policy(guider_log_prob).kl_divergence(policy(learner_log_prob))
    return ppo, kl


def show_point(options: Options) -> None:
    """Prints both terms and their gradients at one point of the last column."""
    guider_prob, delta = options.point
    behaviour_prob = options.behaviour_probs[-1]
    at = jnp.log(guider_prob)
    values = losses(options, at, behaviour_prob, delta)
    slopes = jax.jacobian(lambda x: jnp.stack(losses(options, x, behaviour_prob, delta)))(at)
    print(f"mu {guider_prob:g}, pi {options.learner_prob:g}, mu_old {behaviour_prob:g}, "
          f"A {options.advantage:g}, delta {delta:g}")
    for name, value, slope in zip(("PPO, clipped twice", "masked KL"), values, slopes):
        print(f"{name:20} loss {value:6.3f}   gradient {slope:6.3f}")
    print(f"{'sum':20} loss {sum(values):6.3f}   gradient {sum(slopes):6.3f}")


def draw(options: Options) -> plt.Figure:
    """Upper row: the loss; lower row: its gradient; a column for each mu_old, a line for each
    delta."""
    sns.set_theme(style="ticks", font_scale=1.2, rc={"axes.grid": True, "grid.alpha": 0.3})
    num_columns = len(options.behaviour_probs)
    fig, axes = plt.subplots(
        2, num_columns, figsize=(5 * num_columns, 8.5), sharex=True, sharey="row",
        layout="constrained", squeeze=False)
    log_ratio = jnp.linspace(-1.25, min(1.9, -math.log(options.learner_prob) - 0.05), 2001)
    guider_log_prob = log_ratio + math.log(options.learner_prob)
    colours = sns.color_palette("colorblind", len(options.deltas))
    for (upper, lower), behaviour_prob in zip(axes.T, options.behaviour_probs):
        for i, (delta, colour) in enumerate(zip(options.deltas, colours)):

            def loss(x):
                return sum(losses(options, x, behaviour_prob, delta))

            value, slope = jax.vmap(jax.value_and_grad(loss))(guider_log_prob)
            width = max(5 - 1.2 * i, 1.4)  # where lines coincide, each shows beside the next
            style = {"color": colour, "lw": width, "label": f"delta {delta:g}"}
            upper.plot(log_ratio, value, **style)
            lower.plot(log_ratio, slope, **style)
            if math.isfinite(delta):
                for end in (-math.log(delta), math.log(delta)):
                    for ax in (upper, lower):
                        ax.axvline(end, color=colour, lw=1, ls=":")
        start = math.log(behaviour_prob / options.learner_prob)
        for ax in (upper, lower):
            ax.axvline(start, color="black", lw=1.5, ls="--", label="mu = mu_old")
        lower.axhline(0, color="0.3", lw=1)
        times = behaviour_prob / options.learner_prob
        upper.set_title("mu_old = pi" if times == 1 else f"mu_old = {times:.3g} pi")
        lower.set_xlabel("log(mu / pi)")
    axes[0, 0].set_ylabel(f"loss, A = {options.advantage:g}")
    axes[1, 0].set_ylabel("gradient by log mu")
    place = {"transform": axes[1, 0].transAxes, "ha": "right", "color": "0.3"}
    axes[1, 0].text(0.7, 0.91, "above 0: mu shrinks", **place)
    axes[1, 0].text(0.97, 0.03, "below 0: mu grows", **place)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return fig


def main(words: list | None = None) -> int:
    options = tyro.cli(Options, args=words, description=__doc__)
    show_point(options)
    plt.switch_backend("agg")  # without a display
    os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)
    draw(options).savefig(options.out, dpi=110)
    print(f"picture: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
