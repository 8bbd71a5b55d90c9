def preload(parser):
    parser.add_argument("--dealt-words-dir", type=str, help="folder of word lists", default=None)
