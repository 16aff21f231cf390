"""The evaluation: the same programs natively, in Xenolith's domains and in what people would use instead.

`python -m bench` measures and prints a table; `--list` names the rows and systems.  The parts, in the
order in which a measurement passes through them:

    rows        what can be measured, and how the paper calls it
    workloads/  the programs themselves: C sources, the guest's /init, scripts for the macro workloads
    packages    Debian packages, unpacked without root
    kernel      the stock kernel, as bzImage and as ELF
    image       all that in one initramfs, the same for every system
    systems/    how each system boots this initramfs; each says why when it cannot
    session     one run of one system: its console, with the time at which each line came
    records     what the lines on the console mean
    runner      interleaved rounds over all systems; raw results
    results     the raw results as JSON, and medians over rounds
    tables, plots, report   what people read
    published   the figures of the Xen paper, to stand beside ours
"""
