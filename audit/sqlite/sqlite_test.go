package sqlite_test

import (
	"database/sql"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/audit/audittest"
	"tidemark/audit/sqlite"
)

func open(t *testing.T, dir string) audittest.Store {
	t.Helper()
	s, err := sqlite.Open(t.Context(), filepath.Join(dir, "audit.db"), "tidemark.test/log")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStore(t *testing.T) { audittest.Run(t, open) }

// The log cannot be changed by accident, and a database keeps its name.
func TestLogIsAppendOnly(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	defer s.Close()
	if _, err := audittest.Move(t.Context(), s, audittest.Ref("1"), "a", time.Now()); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", filepath.Join(dir, "audit.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	for _, stmt := range []string{
		"UPDATE log_leaf SET body = x'00'", "DELETE FROM log_leaf", "UPDATE log_hash SET hash = x'00'", "DELETE FROM log_hash",
	} {
		if _, err := db.Exec(stmt); err == nil || !strings.Contains(err.Error(), "append-only") {
			t.Errorf("%s: %v, want a refusal", stmt, err)
		}
	}
	audittest.Check(t, s)
	again, err := sqlite.Open(t.Context(), filepath.Join(dir, "audit.db"), "another.test/log")
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if origin, err := again.Origin(t.Context()); err != nil || origin != "tidemark.test/log" {
		t.Errorf("origin is %q, %v", origin, err)
	}
}

// Every commit is synced, and a database of a later version is refused.
func TestSettingsThatPromisesRestOn(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	defer s.Close()
	db, err := sql.Open("sqlite", filepath.Join(dir, "audit.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var mode string
	if err := db.QueryRow("PRAGMA journal_mode").Scan(&mode); err != nil || mode != "wal" {
		t.Errorf("journal_mode is %q, %v; want wal", mode, err)
	}
	if n, err := s.(*sqlite.Store).Synchronous(t.Context()); err != nil || n != 2 {
		t.Errorf("synchronous is %d, %v; want 2, FULL", n, err)
	}
	if _, err := db.Exec("PRAGMA user_version = 99"); err != nil {
		t.Fatal(err)
	}
	if _, err := sqlite.Open(t.Context(), filepath.Join(dir, "audit.db"), "x"); err == nil || !strings.Contains(err.Error(), "newer version") {
		t.Errorf("Open of a later version: %v", err)
	}
}
