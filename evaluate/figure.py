"""TODO"""

import textwrap


def draw(path, table):
    """A panel a claim, a row an arm, a colour a figure, a dot a seed; figures that are no shares of
    one (words in a text) are left to the table."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = [(f"{paper}: {claim}", [run[claim] for run in runs])
              for paper, runs in table.items() for claim in runs[0]]
    tall = [len(seeds[0]["arms"]) for _, seeds in panels]
    rows = [max(tall[i:i + 2]) for i in range(0, len(tall), 2)]
    figure, axes = pyplot.subplots(len(rows), 2, figsize=(13, sum(rows) * .42 + len(rows) * .9),
                                   squeeze=False, layout="constrained", sharex=True,
                                   gridspec_kw={"height_ratios": [n + 1 for n in rows]})
    for ax, (title, seeds) in zip(axes.flat, panels):
        arms = seeds[0]["arms"]
        names = [name for name in dict.fromkeys(x for arm in arms.values() for x in arm) if all(
            run["arms"][arm].get(name, 0) <= 1 for run in seeds for arm in arms)]
        for i, name in enumerate(names):
            dots = [(run["arms"][arm][name], -at - (i + 1) / (len(names) + 1))
                    for run in seeds for at, arm in enumerate(arms) if name in arms[arm]]
            ax.scatter(*zip(*dots), s=22, label=name)
        held = sum(run["holds"] for run in seeds)
        ax.set_title(f"{textwrap.fill(title, 70)}\nheld in {held} of {len(seeds)} seeds",
                     fontsize=9, loc="left")
        ax.set(xlim=(-.02, 1.02), ylim=(-len(arms), 0))
        ax.set_yticks([-.5 - at for at in range(len(arms))], list(arms), fontsize=8)
        ax.hlines(range(-len(arms) + 1, 0), -.02, 1.02, color="0.85", linewidth=.8)
        ax.legend(fontsize=7, ncols=2)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
