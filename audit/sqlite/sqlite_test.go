package sqlite_test

import (
	"database/sql"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tidemark/audit"
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

// A database of an earlier version is brought up to date where it is, and means
// what it meant: its tags, its history, its log, and what was signed.
func TestDatabaseOfAnEarlierVersion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.db")
	schema, err := os.ReadFile("schema_1.sql")
	if err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	rows, err := os.ReadFile("testdata/version_1.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, script := range [][]byte{schema, rows} {
		if _, err := db.Exec(string(script)); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	s, err := sqlite.Open(t.Context(), path, "x")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	events := audittest.Check(t, s)
	if len(events) != 2 || events[1].Type != audit.Moved {
		t.Errorf("events are %+v", events)
	}
	ref := events[0].Ref
	st, err := s.State(t.Context(), ref)
	if err != nil || st.Head != events[1].New.Digest || st.Served != st.Head || st.Held() || !st.Deleted.IsZero() {
		t.Errorf("state is %+v, %v", st, err)
	}
	if h, err := s.History(t.Context(), ref, audit.HistoryQuery{}); err != nil || len(h) != 2 {
		t.Errorf("history is %+v, %v", h, err)
	}
	if note, err := s.Checkpoint(t.Context()); err != nil || !strings.HasPrefix(string(note), "tidemark/3f0b\n2\n") {
		t.Errorf("checkpoint is %q, %v", note, err)
	}
	if _, err := audittest.Move(t.Context(), s, ref, "next", time.Now()); err != nil {
		t.Fatal(err)
	}
	audittest.Check(t, s)
}

// A database can be read while a server writes it, and not be written.
func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	defer s.Close()
	if _, err := audittest.Move(t.Context(), s, audittest.Ref("1"), "a", time.Now()); err != nil {
		t.Fatal(err)
	}
	r, err := sqlite.OpenReadOnly(t.Context(), filepath.Join(dir, "audit.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if n := len(audittest.Check(t, r)); n != 1 {
		t.Errorf("%d events are read, want 1", n)
	}
	if err := r.Remember(t.Context(), "k", "v"); err == nil {
		t.Error("it was written to")
	}
	if _, err := sqlite.OpenReadOnly(t.Context(), filepath.Join(dir, "absent.db")); err == nil {
		t.Error("a database that is not there was opened")
	}
}
