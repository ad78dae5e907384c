r"""CoordSum 3x10-30 with its target told at the scale of one, not as a number from 0 to 29.

    python magpo_ff.py --env-id docs.scaled:Scaled-v0 --delta 1.3 --learner-rl-coef 2 \
        --num-envs 16 --total-timesteps 300_000

The guider's first layer is a norm over an agent's features, its one-hot id and the target. It
divides by the target, so that large targets look alike: what is left of the id is 1 / target.
"""
import jumanji
from jumanji import specs

from coordsum import CoordSum

MEAN, STD = 14.5, 8.66  # of 0, .., 29


class Scaled(CoordSum):
    """The sizes are those of CoordSum's defaults, 3x10-30."""

    def _observe(self, state):
        obs = super()._observe(state)
        return obs._replace(agents_view=(obs.agents_view - MEAN) / STD)

    @property
    def observation_spec(self):
        view = specs.Array((self.num_agents, 1), float, "agents_view")
        return super().observation_spec.replace(agents_view=view)


jumanji.register(id="Scaled-v0", entry_point=f"{__name__}:Scaled")
