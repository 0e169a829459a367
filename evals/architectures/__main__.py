from evals.architectures.sweep import main

main()
