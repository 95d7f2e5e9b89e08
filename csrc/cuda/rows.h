// Where rows of x lie that kernels can read 16 bytes at a time. Apart from host.h, so that tests can do without torch.
#pragma once

#include <stdint.h>

namespace peftkern {

// TMA takes no rows that overlap. The stride of a single row means nothing: torch leaves there whatever it was.
inline bool rows_readable(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    return (columns <= 1 || column_stride == 1) && (rows <= 1 || (row_stride % 8 == 0 && row_stride >= columns));
}

// The distance that kernels are told, which TMA checks even where there is one row.
inline int64_t stride_of_rows(int64_t rows, int64_t columns, int64_t row_stride) {
    return rows > 1 ? row_stride : columns;
}

}  // namespace peftkern
