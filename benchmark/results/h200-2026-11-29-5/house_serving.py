"""speed.serving of the house's commit, with a mode `before`: the gate of the commit before it."""
import os
import benchmark.speed.serving as serving

BEFORE = "/tmp/old/before"
serving.SERVERS["before"] = (serving.GATE,)
serving.MODES = (*serving.SERVERS, *serving.SHARES)
launch = serving.launch


def launched(model, log, *args, **options):
    if str(log).endswith(".before.log"):
        path = [BEFORE, f"{BEFORE}/python", f"{BEFORE}/sgl-kernel-patches", os.environ["PYTHONPATH"]]
        options["env"] = {"PYTHONPATH": os.pathsep.join(path)}
    return launch(model, log, *args, **options)


serving.launch = launched
serving.main()
