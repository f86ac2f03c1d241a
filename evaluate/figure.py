"""evaluate.figure: the claims of evaluate/claims.py as one picture.

A panel for each claim, a row for each arm, a colour for each figure, a dot for each seed. Figures
that are no shares of one (words of a text) are only in the table.
"""
import textwrap


def share_names(seeds):
    """Names of the figures that are at most 1 in every arm and seed, in order."""
    names = {}
    for arm in seeds[0]["arms"].values():
        names |= dict.fromkeys(arm)
    return [name for name in names
            if all(values.get(name, 0) <= 1 for run in seeds for values in run["arms"].values())]


def draw_claim(ax, title, seeds):
    """One panel. seeds: the claim of each run, {"arms", "holds"}."""
    arms, names = list(seeds[0]["arms"]), share_names(seeds)
    for i, name in enumerate(names):
        x, y = [], []
        for run in seeds:
            for row, arm in enumerate(arms):
                if name in run["arms"][arm]:
                    x.append(run["arms"][arm][name])
                    y.append(-row - (i + 1) / (len(names) + 1))     # its own line inside the row
        ax.scatter(x, y, s=22, label=name)
    held = sum(run["holds"] for run in seeds)
    ax.set_title(f"{textwrap.fill(title, 70)}\nheld in {held} of {len(seeds)} seeds",
                 fontsize=9, loc="left")
    ax.set(xlim=(-.02, 1.02), ylim=(-len(arms), 0))
    ax.set_yticks([-.5 - row for row in range(len(arms))], arms, fontsize=8)
    ax.hlines(range(-len(arms) + 1, 0), -.02, 1.02, color="0.85", linewidth=.8)
    ax.legend(fontsize=7, ncols=2)


def draw(path, table):
    """Write a PNG. table: {paper: [{claim: {"arms", "holds"}} of each seed]}."""
    import matplotlib  # here: it takes a second, and one command of seven
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = []
    for paper, runs in table.items():
        for claim in runs[0]:
            panels.append((f"{paper}: {claim}", [run[claim] for run in runs]))
    tall = [len(seeds[0]["arms"]) for _, seeds in panels]
    rows = [max(tall[i:i + 2]) for i in range(0, len(tall), 2)]     # two panels side by side
    chart, axes = pyplot.subplots(len(rows), 2, figsize=(13, sum(rows) * .42 + len(rows) * .9),
                                  squeeze=False, layout="constrained", sharex=True,
                                  gridspec_kw={"height_ratios": [n + 1 for n in rows]})
    for ax, (title, seeds) in zip(axes.flat, panels):
        draw_claim(ax, title, seeds)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    chart.savefig(path, dpi=80)
    pyplot.close(chart)
