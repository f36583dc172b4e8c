# When does imitation stop? All runs of docs/demo.md's table, one thread each; two seeds at a time fit two cores.
export OMP_NUM_THREADS=1
for s in 40 41 42 43 44 45; do
  for strength in "high 0.34 3" "low 0.31 5"; do
    set -- $strength  # name, where stage 2 stops, alpha = beta
    python data_prep.py demo --seed $s --worked-out 0.2 --stop-at $2 --out runs/$1$s
    run() { name=$1; shift; "$@" --model runs/$h$s/model --seed $s --eval-every 40 --out runs/$h-$name$s; }
    h=$1 w=$3
    run grpo  python tars.py --alpha 0 --beta 0
    run tars  python tars.py --alpha $w --beta $w
    run sft   python course/baselines.py sft --lr 0.0016
    run isft  python course/baselines.py sft --lr 0.0016 --rounds 4
    run dpo   python course/baselines.py dpo --lr 0.0005
    run rep   python tars.py --alpha $w --beta 0
    run beh   python tars.py --alpha 0 --beta $w
    run joint python tars.py --alpha $w --beta $w --joint-norm
  done
done
