from smartbatch_lightning.cli import main

main()
