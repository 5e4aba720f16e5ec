"""All factors of a run in one small file, as weights are handed on. Command export."""
from pixelaux import PATH, Parser, Problem, load, read_checkpoint, save


def main(argv):
    """export RUN FILE."""
    parser = Parser(prog="pixelaux.py export", description="all factors in one file, in bfloat16")
    parser.add("run")
    parser.add_argument("file", type=PATH, metavar="FILE", help="to write")
    args = parser.parse_args(argv[1:])
    model = load(args.run).bfloat16()
    if args.file.exists() and "training" in read_checkpoint(args.file):  # which refuses others
        raise Problem(f"{args.file}: a checkpoint of training, which is not overwritten; "
                      "expected another name")
    save(model, args.file)
    nr_weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.file}: {nr_weights:,} weights, {args.file.stat().st_size:,} bytes")
