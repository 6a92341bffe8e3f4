package sqlite

import "context"

// Synchronous is the setting of the connection that writes.
func (s *Store) Synchronous(ctx context.Context) (n int, err error) {
	err = s.write.QueryRowContext(ctx, "PRAGMA synchronous").Scan(&n)
	return n, err
}
