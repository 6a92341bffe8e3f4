package audittest

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"

	"tidemark/audit"
)

// cargo is a bundle of another log in which refs mean the digest of a name.
func cargo(bundle string, name string, at time.Time, tags ...string) audit.Cargo {
	c := audit.Cargo{Bundle: Digest(bundle), Origin: "tidemark.test/other", VKey: "key of " + bundle, LogSize: 40}
	for i, tag := range tags {
		index := int64(i)
		c.Refs = append(c.Refs, audit.Carried{
			Ref: Ref(tag), Digest: Digest(name), MediaType: "application/x", Size: 7, Confirmed: at,
			Claims: []audit.Claim{{
				Basis: audit.Imported, Source: "tidemark.test/other", Digest: Digest(name), MediaType: "application/x", Size: 7,
				Since: at.Add(-time.Hour), LastConfirmed: at.Add(-time.Hour), SourceIndex: &index,
			}},
			Referrers: []audit.Referrer{{Subject: Digest(name), Digest: Digest("signature of " + name), Descriptor: []byte(`{"digest":"x"}`)}},
		})
	}
	return c
}

// ledger is a ledger over s at a fixed time.
func ledger(s Store, now time.Time) *audit.Ledger {
	return audit.New(audit.Options{Store: s, Memory: s, Now: func() time.Time { return now }})
}

func imports(t *testing.T, open func() Store) {
	s := open()
	l := ledger(s, start)
	mustMove(t, s, Ref("1"), "own", start.Add(-48*time.Hour))
	c := cargo("monday", "carried", start.Add(-time.Hour), "1", "2")

	// If it ends in the middle, nothing of it is there.
	bad := c
	bad.Refs = append(slices.Clone(c.Refs), audit.Carried{Ref: Ref("3"), Digest: Digest("x")})
	func() {
		defer func() { _ = recover() }()
		_, err := s.Import(t.Context(), bad, audit.Event{ID: uuid.Must(uuid.NewV7()), Type: audit.Action, Time: start, Operator: &audit.Operator{Action: "import"}}, func(c audit.Carried, r audit.Record, _ time.Time) (audit.State, []audit.Event) {
			if c.Ref == Ref("3") {
				panic("no")
			}
			return r.State, nil
		})
		t.Errorf("an import that panics returned %v", err)
	}()
	if n := len(Check(t, s)); n != 1 {
		t.Fatalf("after a failed import there are %d events, want the one from before", n)
	}

	became, err := l.Import(t.Context(), s, c)
	if err != nil || became[Ref("1")] != audit.CarriedMoved || became[Ref("2")] != audit.CarriedNew {
		t.Fatalf("Import = %v, %v", became, err)
	}
	check := func(s Store) {
		t.Helper()
		events := Check(t, s)
		if len(events) != 4 || events[1].Type != audit.Action || events[1].Operator.Digest != c.Bundle {
			t.Fatalf("events are %v, want the move, the import and a move of each ref", events)
		}
		for _, tag := range []string{"1", "2"} {
			st, err := s.State(t.Context(), Ref(tag))
			if err != nil || st.Served != Digest("carried") {
				t.Errorf("%s serves %s, %v", tag, st.Served, err)
			}
			claims, err := s.Claims(t.Context(), Ref(tag))
			if err != nil || len(claims) != 1 || claims[0].Basis != audit.Imported || !claims[0].LastConfirmed.Equal(start.Add(-time.Hour)) {
				t.Errorf("claims of %s: %+v, %v", tag, claims, err)
			}
			stints, err := s.History(t.Context(), Ref(tag), audit.HistoryQuery{})
			if err != nil || len(stints) == 0 || stints[0].Basis != audit.Imported {
				t.Errorf("history of %s: %+v, %v", tag, stints, err)
			}
		}
		if list, err := s.Referrers(t.Context(), "docker.io", "library/app", Digest("carried")); err != nil || len(list) != 1 {
			t.Errorf("referrers: %v, %v", list, err)
		}
		if key, err := s.TrustedKey(t.Context(), c.Origin); err != nil || key != c.VKey {
			t.Errorf("trusted key is %q, %v", key, err)
		}
		var kept []string
		for k, err := range s.Keep(t.Context(), 0, start.Add(-time.Hour)) {
			if err != nil {
				t.Fatal(err)
			}
			if k.Reason == audit.KeptBundle && k.Firm {
				kept = append(kept, k.Digest.String())
			}
		}
		if !slices.Contains(kept, Digest("carried").String()) || !slices.Contains(kept, Digest("signature of carried").String()) {
			t.Errorf("kept for the bundle: %v", kept)
		}
	}
	check(s)
	if _, err := l.Import(t.Context(), s, c); !errors.Is(err, audit.ErrImportedAlready) {
		t.Errorf("again: %v, want ErrImportedAlready", err)
	}
	check(s)
	s.Close()
	check(open())
}

func importsGoOn(t *testing.T, open func() Store) {
	s := open()
	mustImport := func(c audit.Cargo, now time.Time) map[audit.Ref]string {
		t.Helper()
		became, err := ledger(s, now).Import(t.Context(), s, c)
		if err != nil {
			t.Fatal(err)
		}
		Check(t, s)
		return became
	}
	monday, tuesday := start, start.Add(24*time.Hour)
	mustImport(cargo("monday", "a", monday.Add(-time.Hour), "1"), monday)
	delta := cargo("tuesday", "b", tuesday.Add(-time.Hour), "1")
	ended := tuesday.Add(-2 * time.Hour)
	delta.Refs[0].Closed = &audit.Claim{Basis: audit.Imported, Source: delta.Origin, Digest: Digest("a"), Until: &ended, EndReason: "tag.moved", LastConfirmed: ended.Add(-time.Minute)}
	if became := mustImport(delta, tuesday); became[Ref("1")] != audit.CarriedMoved {
		t.Errorf("a delta: %v", became)
	}
	claims, err := s.Claims(t.Context(), Ref("1"))
	if err != nil || len(claims) != 2 || claims[1].Until == nil || !claims[1].Until.Equal(ended) || claims[1].EndReason != "tag.moved" {
		t.Errorf("claims after the delta: %+v, %v", claims, err)
	}
	// An older bundle brings its history, and changes nothing else.
	if became := mustImport(cargo("sunday", "z", monday.Add(-24*time.Hour), "1"), tuesday); became[Ref("1")] != audit.CarriedOlder {
		t.Errorf("an older one: %v", became)
	}
	if st, err := s.State(t.Context(), Ref("1")); err != nil || st.Served != Digest("b") {
		t.Errorf("after an older bundle %s is served, %v", st.Served, err)
	}
	for k, err := range s.Keep(t.Context(), 0, tuesday) {
		if err != nil {
			t.Fatal(err)
		}
		if k.Reason == audit.KeptBundle && k.Digest == Digest("z") {
			t.Error("what an older bundle brought is kept")
		}
	}
}

func pins(t *testing.T, open func() Store) {
	s := open()
	l := ledger(s, start)
	mustMove(t, s, Ref("1"), "a", start)
	ref := audit.Pin{Target: Ref("1").String(), Ref: Ref("1"), Platforms: []string{"linux/amd64"}, Reason: "the base"}
	dgst := audit.Pin{Target: Digest("d").String(), Digest: Digest("d")}
	for _, p := range []audit.Pin{ref, dgst, dgst} {
		if err := l.Pin(t.Context(), s, p); err != nil {
			t.Fatal(err)
		}
	}
	keeps := func(d digest.Digest) (found *audit.Kept) {
		for k, err := range s.Keep(t.Context(), 0, start) {
			if err != nil {
				t.Fatal(err)
			}
			if k.Reason == audit.KeptPin && k.Digest == d {
				found = &k
			}
		}
		return found
	}
	if k := keeps(Digest("a")); k == nil || !k.Firm || fmt.Sprint(k.Platforms) != "[linux/amd64]" || k.For != ref.Target || k.Note != "the base" {
		t.Errorf("the ref keeps %+v", k)
	}
	mustMove(t, s, Ref("1"), "b", start.Add(time.Hour))
	if keeps(Digest("b")) == nil || keeps(Digest("a")) != nil {
		t.Error("the pin of a ref does not follow it")
	}
	s.Close()
	s = open()
	l = ledger(s, start)
	if err := l.Unpin(t.Context(), s, ref); err != nil || keeps(Digest("b")) != nil || keeps(Digest("d")) == nil {
		t.Errorf("Unpin: %v; it keeps %v and %v", err, keeps(Digest("b")), keeps(Digest("d")))
	}
	events := len(Check(t, s))
	if err := l.Unpin(t.Context(), s, ref); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what is not pinned: %v", err)
	}
	if n := len(Check(t, s)); n != events || events != 6 {
		t.Errorf("%d events, then %d; want two moves, three pins and one unpin", events, n)
	}
}

func claims(t *testing.T, open func() Store) {
	s := open()
	l := ledger(s, start)
	ended := start.Add(-24 * time.Hour)
	said := []audit.Claim{
		{Basis: audit.Asserted, Source: "quay", Digest: Digest("x"), Since: ended.Add(-time.Hour), LastConfirmed: ended, Until: &ended},
		{Basis: audit.Asserted, Source: "quay", Digest: Digest("y"), Since: ended, LastConfirmed: start},
	}
	for i, want := range []int{2, 0} {
		if added, err := l.Backfill(t.Context(), s, Ref("1"), "quay", said); err != nil || added != want {
			t.Fatalf("call %d: %d were added, %v; want %d", i, added, err, want)
		}
	}
	if events := Check(t, s); len(events) != 1 || events[0].Operator.Action != "backfill" {
		t.Errorf("events: %v, want one backfill", events)
	}
	got, err := s.Claims(t.Context(), Ref("1"))
	if err != nil || len(got) != 2 || got[0].Digest != Digest("y") || got[0].Until != nil || got[1].Until == nil || !got[1].Until.Equal(ended) {
		t.Errorf("Claims = %+v, %v", got, err)
	}
	if st, err := s.State(t.Context(), Ref("1")); err != nil || st.Known() {
		t.Errorf("what upstream says of its past made the ref known: %+v, %v", st, err)
	}
	for at, want := range map[time.Time]int{ended.Add(-2 * time.Hour): 0, ended.Add(-time.Minute): 1, start: 1} {
		if names, err := s.TagNamesAt(t.Context(), "docker.io", "library/app", audit.AtTime(at)); err != nil || len(names) != want {
			t.Errorf("tags at %s: %v, %v; want %d", at, names, err, want)
		}
	}
	if names, err := s.TagNamesAt(t.Context(), "docker.io", "library/app", audit.AtIndex(0)); err != nil || len(names) != 0 {
		t.Errorf("tags after the entry that brought the claims: %v, %v", names, err)
	}
	c, err := s.Chronicle(t.Context(), Ref("1"))
	if err != nil || len(c.Claims) != 2 || c.Size != 1 {
		t.Errorf("Chronicle = %+v, %v", c, err)
	}
}

func referrers(t *testing.T, open func() Store) {
	s := open()
	list := []audit.Referrer{
		{Subject: Digest("image"), Digest: Digest("signature"), Descriptor: []byte(`{"v":1}`)},
		{Subject: Digest("image"), Digest: Digest("sbom"), Descriptor: []byte(`{"v":1}`)},
	}
	for range 2 {
		if err := s.AddReferrers(t.Context(), "docker.io", "library/app", list); err != nil {
			t.Fatal(err)
		}
	}
	list[1].Descriptor = []byte(`{"v":2}`)
	if err := s.AddReferrers(t.Context(), "docker.io", "library/app", list[1:]); err != nil {
		t.Fatal(err)
	}
	got, err := s.Referrers(t.Context(), "docker.io", "library/app", Digest("image"))
	slices.SortFunc(list, func(a, b audit.Referrer) int { return cmpDigest(a.Digest, b.Digest) })
	if err != nil || fmt.Sprint(got) != fmt.Sprint(list) {
		t.Errorf("Referrers = %v, %v; want %v", got, err, list)
	}
	for _, other := range []string{"library/other", ""} {
		if got, err := s.Referrers(t.Context(), "docker.io", other, Digest("image")); err != nil || len(got) != 0 {
			t.Errorf("of another repository: %v, %v", got, err)
		}
	}
}

func cmpDigest(a, b digest.Digest) int {
	if a < b {
		return -1
	}
	return 1
}

func tagsAt(t *testing.T, open func() Store) {
	s := open()
	mustMove(t, s, Ref("a"), "1", start)                // entry 0
	mustMove(t, s, Ref("b"), "1", start.Add(time.Hour)) // entry 1
	for _, tt := range []struct {
		at   audit.Moment
		want []string
	}{
		{audit.AtTime(start.Add(-time.Second)), nil}, {audit.AtTime(start), []string{"a"}}, {audit.AtTime(start.Add(time.Hour)), []string{"a", "b"}},
		{audit.AtIndex(0), []string{"a"}}, {audit.AtIndex(1), []string{"a", "b"}},
	} {
		if got, err := s.TagNamesAt(t.Context(), "docker.io", "library/app", tt.at); err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("at %s: %v, %v; want %v", tt.at, got, err, tt.want)
		}
	}
}

func eventsOfRefs(t *testing.T, open func() Store) {
	s := open()
	for i := range 600 { // more than a page
		mustMove(t, s, Ref(fmt.Sprint(i%3)), fmt.Sprint(i), start.Add(time.Duration(i)*time.Minute))
	}
	from := map[audit.Ref]int64{Ref("0"): 0, Ref("1"): 300, Ref("never seen"): 0}
	var got []int64
	for e, err := range s.EachEvent(t.Context(), from, 590) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e.Index)
	}
	var want []int64
	for i := range int64(590) {
		if i%3 == 0 || i%3 == 1 && i >= 300 {
			want = append(want, i)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%d events, want %d: %v", len(got), len(want), got)
	}
	for range s.EachEvent(t.Context(), from, 590) {
		break // a reader that stops
	}
}
