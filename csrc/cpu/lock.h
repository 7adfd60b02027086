/* One lock for every write to an accumulator on the CPU, so that threads sharing a layer lose no count. */
#ifndef KASMINA_CPU_LOCK_H
#define KASMINA_CPU_LOCK_H

void kasmina_lock(void);
void kasmina_unlock(void);

#endif
