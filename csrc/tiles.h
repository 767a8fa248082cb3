// A product's register tile. products.cpp includes this file once per instruction set, and defines before each include
// the operand type (Number, and Factor for a vector of them), the accumulator (Vector, of kWidth floats), how these are
// loaded, stored, filled and multiplied, and the number of rows and vectors of C in a tile.

// C [rows, vectors * kWidth] (+)= A B.
template <int rows, int vectors>
void tile(Matrix<Number> a, const Number* b, int64_t b_row, float* c, int64_t c_row, int64_t K, bool add) {
  Vector sums[rows][vectors];
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) sums[i][j] = add ? load(c + i * c_row + j * kWidth) : zero();
  for (int64_t k = 0; k < K; ++k) {
    Factor of_b[vectors];
    for (int j = 0; j < vectors; ++j) of_b[j] = load(b + k * b_row + j * kWidth);
    for (int i = 0; i < rows; ++i) {
      const Factor of_a = fill(a.data[i * a.row + k * a.column]);
      for (int j = 0; j < vectors; ++j) sums[i][j] = multiply_add(of_a, of_b[j], sums[i][j]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j) store(c + i * c_row + j * kWidth, sums[i][j]);
}

// All rows of C for `vectors` vectors of columns: whole tiles, then smaller ones for the remaining rows.
template <int vectors, int rows = kTileRows>
void column_of_tiles(
    Matrix<Number> a, const Number* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t K, bool add) {
  int64_t m = 0;
  for (; m + rows <= M; m += rows)
    tile<rows, vectors>({a.data + m * a.row, a.row, a.column}, b, b_row, c + m * c_row, c_row, K, add);
  if constexpr (rows > 1)
    if (m < M)
      column_of_tiles<vectors, rows - 1>(
          {a.data + m * a.row, a.row, a.column}, b, b_row, c + m * c_row, c_row, M - m, K, add);
}

void tiles(
    Matrix<Number> a, const Number* b, int64_t b_row, float* c, int64_t c_row, int64_t M, int64_t N, int64_t K,
    bool add) {
  constexpr int64_t kColumns = kTileVectors * kWidth;
  int64_t n = 0;
  for (; n + kColumns <= N; n += kColumns)
    column_of_tiles<kTileVectors>(a, b + n, b_row, c + n, c_row, M, K, add);
  for (; n < N; n += kLanes) column_of_tiles<kLanes / kWidth>(a, b + n, b_row, c + n, c_row, M, K, add);
}
