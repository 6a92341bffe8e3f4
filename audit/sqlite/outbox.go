package sqlite

import (
	"context"
	"database/sql"
	"time"

	"github.com/google/uuid"

	"tidemark/audit"
)

// putRecipients enters who is to be told of an event, in its own transaction. Who was not
// to be told yet of what it takes back is told of neither: what should have been told by
// now, and could not, still is.
func putRecipients(ctx context.Context, tx *sql.Tx, refID, index int64, e audit.Event) error {
	for _, n := range e.Recipients {
		if e.Flapped != uuid.Nil {
			res, err := tx.ExecContext(ctx, `DELETE FROM outbox WHERE sink = ?1 AND batch IS NULL AND dead = 0 AND reminder = 0 AND next_at > ?4
				AND (ref_id = ?2 AND leaf_idx >= (SELECT idx FROM log_leaf WHERE event_id = ?3) OR leaf_idx = (SELECT idx FROM notice WHERE event_id = ?3))`, n.Sink, refID, e.Flapped.String(), millis(e.Time))
			if err != nil {
				return err
			}
			if gone, err := res.RowsAffected(); err != nil || gone > 0 {
				if err != nil {
					return err
				}
				continue
			}
		}
		if _, err := tx.ExecContext(ctx, "INSERT INTO outbox (sink, leaf_idx, ref_id, next_at) VALUES (?, ?, ?, ?)",
			n.Sink, index, sql.NullInt64{Int64: refID, Valid: refID != 0}, millis(n.At)); err != nil {
			return err
		}
	}
	return nil
}

// Due implements audit.Outbox.
func (s *Store) Due(ctx context.Context, sink string, now time.Time, limit int) ([]audit.Letter, error) {
	// A letter waits for a message about its ref that was tried and not taken yet.
	rows, err := s.read.QueryContext(ctx, `
		SELECT o.leaf_idx, coalesce(l.body, n.body), coalesce(r.upstream, ''), coalesce(r.repository, ''), coalesce(r.tag, ''), coalesce(o.batch, ''), o.attempts, o.next_at, o.reminder
		FROM outbox o LEFT JOIN log_leaf l ON l.idx = o.leaf_idx LEFT JOIN notice n ON n.idx = o.leaf_idx LEFT JOIN ref r ON r.id = o.ref_id
		WHERE o.sink = ?1 AND o.dead = 0 AND o.next_at <= ?2 AND NOT EXISTS (
			SELECT 1 FROM outbox p WHERE p.sink = ?1 AND p.dead = 0 AND p.ref_id = o.ref_id AND p.leaf_idx < o.leaf_idx
				AND p.batch IS NOT NULL AND p.batch IS NOT o.batch)
		ORDER BY o.batch IS NULL, o.batch, o.leaf_idx LIMIT ?3`, sink, millis(now), limit)
	if err != nil {
		return nil, err
	}
	return collect(rows, func(scan scanner) (l audit.Letter, err error) {
		var at int64
		err = scan(&l.Index, &l.Leaf, &l.Ref.Upstream, &l.Ref.Repository, &l.Ref.Tag, &l.Batch, &l.Attempts, &at, &l.Reminder)
		l.At = fromMillis(at)
		return l, err
	})
}

// NextDue implements audit.Outbox.
func (s *Store) NextDue(ctx context.Context, sink string) (time.Time, error) {
	var at sql.NullInt64
	err := s.read.QueryRowContext(ctx, "SELECT min(next_at) FROM outbox WHERE sink = ? AND dead = 0", sink).Scan(&at)
	if err != nil || !at.Valid {
		return time.Time{}, err
	}
	return fromMillis(at.Int64), nil
}

// Seal implements audit.Outbox.
func (s *Store) Seal(ctx context.Context, sink, batch string, indexes []int64) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		for _, i := range indexes {
			if _, err := tx.ExecContext(ctx, "UPDATE outbox SET batch = ? WHERE sink = ? AND leaf_idx = ? AND batch IS NULL", batch, sink, i); err != nil {
				return err
			}
		}
		return nil
	})
}

// Settle implements audit.Outbox.
func (s *Store) Settle(ctx context.Context, d audit.Delivery) error {
	return s.tx(ctx, func(tx *sql.Tx) (err error) {
		switch {
		case d.Sent:
			_, err = tx.ExecContext(ctx, "DELETE FROM outbox WHERE sink = ? AND batch = ?", d.Sink, d.Batch)
		case d.Dead:
			_, err = tx.ExecContext(ctx, "UPDATE outbox SET dead = 1, attempts = attempts + 1, last_error = ? WHERE sink = ? AND batch = ?", d.Error, d.Sink, d.Batch)
		default:
			_, err = tx.ExecContext(ctx, "UPDATE outbox SET attempts = attempts + 1, next_at = ?, last_error = ? WHERE sink = ? AND batch = ?", millis(d.Again), d.Error, d.Sink, d.Batch)
		}
		return err
	})
}

// OutboxCounts returns how many letters there are, by sink and state.
func (s *Store) OutboxCounts(ctx context.Context) ([]audit.OutboxCount, error) {
	rows, err := s.read.QueryContext(ctx, "SELECT sink, iif(dead, 'dead', 'pending'), count(*) FROM outbox GROUP BY 1, 2 ORDER BY 1, 2")
	if err != nil {
		return nil, err
	}
	return collect(rows, func(scan scanner) (c audit.OutboxCount, err error) {
		err = scan(&c.Sink, &c.State, &c.N)
		return c, err
	})
}

// Requeue has a sink be told, again or for the first time, of entries of the log.
func (s *Store) Requeue(ctx context.Context, sink string, indexes []int64, now time.Time) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		for _, i := range indexes {
			if _, err := tx.ExecContext(ctx, `INSERT INTO outbox (sink, leaf_idx, ref_id, next_at) SELECT ?, idx, ref_id, ? FROM log_leaf WHERE idx = ?
				ON CONFLICT (sink, leaf_idx) DO UPDATE SET dead = 0, batch = NULL, attempts = 0, reminder = 0, next_at = excluded.next_at, last_error = ''`,
				sink, millis(now), i); err != nil {
				return err
			}
		}
		return nil
	})
}
