/* Sums, maxima and minima of the types that the exchange does not add up itself. */
#ifndef ZMOE_FOLDS_H
#define ZMOE_FOLDS_H

#include <stddef.h>

enum { ZMOE_FOLD_SUM, ZMOE_FOLD_MAX, ZMOE_FOLD_MIN, ZMOE_FOLDS };

/* into[i] = into[i] op from[i] */
typedef void zmoe_fold(void *into, const void *from, size_t count);

/* By MLX's name of the type; NULL: there is none. */
zmoe_fold *zmoe_fold_of(const char *type, int op);

#endif
