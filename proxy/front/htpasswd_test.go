package front_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/bcrypt"

	"tidemark/proxy/front"
)

// hashed is a line of a file of users, as htpasswd -B makes it, but quicker.
func hashed(t testing.TB, user, password string, cost int) string {
	t.Helper()
	hash, err := bcrypt.GenerateFromPassword([]byte(password), cost)
	if err != nil {
		t.Fatal(err)
	}
	return user + ":$2y$" + strings.TrimPrefix(string(hash), "$2a$")
}

// A userFile is a file of users. Each content has a time of its own, which is not
// the clock's, so that two never look like one.
type userFile struct {
	path string
	n    int64
}

func newUserFile(t testing.TB, lines ...string) *userFile {
	t.Helper()
	f := &userFile{path: filepath.Join(t.TempDir(), "users")}
	f.put(t, lines...)
	return f
}

func (f *userFile) put(t testing.TB, lines ...string) {
	t.Helper()
	if err := os.WriteFile(f.path+".new", []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	f.n++
	at := time.Unix(1_700_000_000+f.n, 0)
	if err := os.Chtimes(f.path+".new", at, at); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(f.path+".new", f.path); err != nil {
		t.Fatal(err)
	}
}

func (f *userFile) open(t testing.TB, log *bytes.Buffer) *front.Htpasswd {
	t.Helper()
	h, err := front.OpenHtpasswd(f.path, zerolog.New(log))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// Who stands in the file may enter with the password that stands there for this
// user, the first time and when it is remembered, and nobody else.
func TestUsersOfTheFileMayEnter(t *testing.T) {
	const min = bcrypt.MinCost
	f := newUserFile(t,
		"# users of the mirror", "", hashed(t, "anna", "of anna", min), "   ", "  "+hashed(t, "ben", "of:ben", min)+"\t\r", "# "+hashed(t, "carl", "of carl", min),
		strings.Replace(hashed(t, "dora", "öf dörä", min), "$2y$", "$2a$", 1), strings.Replace(hashed(t, "emil", " of emil ", min), "$2y$", "$2b$", 1), "#", "")
	h := f.open(t, new(bytes.Buffer))
	for range 2 {
		for _, c := range []struct {
			user, password string
			ok             bool
		}{
			{"anna", "of anna", true}, {"ben", "of:ben", true}, {"dora", "öf dörä", true}, {"emil", " of emil ", true},
			{"anna", "of ben", false}, {"anna", "", false}, {"anna", "of anna ", false}, {"anna", "Of anna", false}, {"anna", "of ann", false}, {"emil", "of emil", false},
			{"Anna", "of anna", false}, {" anna", "of anna", false}, {"anna ", "of anna", false}, {"carl", "of carl", false}, {"# carl", "of carl", false}, {"#", "", false},
			{"zoe", "of anna", false}, {"zoe", "", false}, {"", "", false}, {"", "of anna", false}, {"anna:", "of anna", false}, {"anna\x00", "of anna", false},
			{strings.Repeat("x", 60_000), strings.Repeat("y", 60_000), false}, {"anna", strings.Repeat("of anna", 9_000), false},
		} {
			if got := h.Allows(c.user, c.password); got != c.ok {
				t.Errorf("%.20q with %.20q may enter: %t, want %t", c.user, c.password, got, c.ok)
			}
		}
	}
}

// A change of the file counts after a second: new users and passwords, and that
// somebody is gone, whose password was remembered.
func TestChangeOfUsersIsFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		anna, ben := hashed(t, "anna", "of anna", bcrypt.MinCost), hashed(t, "ben", "of ben", bcrypt.MinCost)
		f := newUserFile(t, anna, ben)
		h := f.open(t, &log)
		may := func(user, password string, want bool) {
			t.Helper()
			if got := h.Allows(user, password); got != want {
				t.Errorf("%s with %q may enter: %t, want %t", user, password, got, want)
			}
		}
		for range 2 {
			may("anna", "of anna", true)
			may("ben", "of ben", true)
			may("cleo", "of cleo", false)
		}
		for _, c := range []struct {
			lines                 []string
			anna, ben, cleo, anew bool
		}{
			{[]string{ben, hashed(t, "cleo", "of cleo", bcrypt.MinCost)}, false, true, true, false},
			{[]string{anna}, true, false, false, false},
			{[]string{hashed(t, "anna", "anew", bcrypt.MinCost), ben}, false, true, false, true},
		} {
			f.put(t, c.lines...)
			time.Sleep(time.Second)
			for range 2 {
				may("anna", "of anna", c.anna)
				may("ben", "of ben", c.ben)
				may("cleo", "of cleo", c.cleo)
				may("anna", "anew", c.anew)
			}
		}
		if log.Len() != 0 {
			t.Errorf("log = %s, want nothing", &log)
		}
	})
}

// A file that cannot be read, or is broken, leaves the users of before, which is
// told, but not at every request; once it is mended it counts.
func TestBrokenFileOfUsersLeavesThoseOfBefore(t *testing.T) {
	for name, spoil := range map[string]func(*testing.T, *userFile){
		"no hash": func(t *testing.T, f *userFile) { f.put(t, hashed(t, "ben", "of ben", bcrypt.MinCost), "anna:hunter2") },
		"empty":   func(t *testing.T, f *userFile) { f.put(t) },
		"gone": func(t *testing.T, f *userFile) {
			if err := os.Remove(f.path); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				f := newUserFile(t, hashed(t, "anna", "of anna", bcrypt.MinCost))
				h := f.open(t, &log)
				spoil(t, f)
				for range 3 {
					time.Sleep(time.Second)
					log.Reset()
					for range 5 {
						if !h.Allows("anna", "of anna") || h.Allows("anna", "hunter2") || h.Allows("ben", "of ben") {
							t.Error("the users are others than before")
						}
					}
					if got := log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `"warn"`) || !strings.Contains(got, f.path) || strings.Contains(got, "hunter2") {
						t.Errorf("log = %s, want one warning that names %s", got, f.path)
					}
				}
				f.put(t, hashed(t, "ben", "of ben", bcrypt.MinCost))
				time.Sleep(time.Second)
				if h.Allows("anna", "of anna") || !h.Allows("ben", "of ben") {
					t.Error("the mended file does not count")
				}
			})
		})
	}
}

// A file that would let somebody in by mistake, or keep somebody out for ever, is
// refused when it is opened, by the line, and without what may be secret of it.
func TestFileOfUsersThatIsRefused(t *testing.T) {
	const secret = "hunter2"
	good := hashed(t, "good", "of good", bcrypt.MinCost)
	user, hash, _ := strings.Cut(hashed(t, "anna", "of anna", bcrypt.MinCost), ":")
	for _, c := range []struct {
		name  string
		lines []string
		says  string
		leak  string
	}{
		{"md5", []string{good, "", "anna:$apr1$hunter2x$Zr9QfXjGkCJx0dX2pE2fD/"}, "line 3", "Zr9Q"},
		{"sha", []string{"anna:{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g="}, "line 1", "W6ph"},
		{"crypt", []string{good, "anna:rqXexS6ZhobKA"}, "line 2", "rqXe"},
		{"sha512", []string{good, "anna:$6$saltsalt$qFmFH.bQmmtXzyBY0s9v7Oicd2z4XSIecDzlB5KiA2/jctKu9YterLp8wwnSq.qc.eoxqOmSuNp2xS0ktL3nh/"}, "line 2", "qFmF"},
		{"in the clear", []string{good, "# x", "anna:" + secret}, "line 3", secret},
		{"a password alone", []string{good, secret}, "line 2", secret},
		{"no hash", []string{good, "anna:"}, "line 2", "-"},
		{"no user", []string{good, ":" + hash}, "line 2", hash[8:]},
		{"a cost that there is none", []string{good, "anna:" + strings.Replace(hash, "$04$", "$99$", 1)}, "line 2", hash[8:]},
		{"half a hash", []string{good, "anna:" + hash[:40]}, "line 2", hash[8:40]},
		{"a hash that lacks a character", []string{good, "anna:" + hash[:59]}, "line 2", hash[8:59]},
		{"a hash with more behind it", []string{good, "anna:" + hash + ":1000:100"}, "line 2", hash[8:]},
		{"two users in one line", []string{good, "anna:" + hash + " ben:" + hash}, "line 2", hash[8:]},
		{"twice the same user", []string{good, user + ":" + hash, good}, "line 3", hash[8:]},
		{"nothing", nil, "no user", "-"},
		{"nothing but comments", []string{"# anna", "", "  "}, "no user", "-"},
		{"a line that does not end", []string{good, "# " + strings.Repeat("x", 70_000), "anna:" + secret}, "line", secret},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newUserFile(t, c.lines...)
			h, err := front.OpenHtpasswd(f.path, zerolog.Nop())
			if err == nil {
				t.Fatalf("it is opened; anna may enter with %q: %t", secret, h.Allows("anna", secret))
			}
			if !strings.Contains(err.Error(), f.path) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error = %v, want one that names %s and %q", err, f.path, c.says)
			}
			if strings.Contains(strings.ReplaceAll(err.Error(), f.path, ""), c.leak) && c.leak != "-" {
				t.Errorf("error = %v shows what may be secret", err)
			}
		})
	}
	absent := filepath.Join(t.TempDir(), "users")
	if _, err := front.OpenHtpasswd(absent, zerolog.Nop()); !os.IsNotExist(unwrap(err)) || !strings.Contains(err.Error(), absent) {
		t.Errorf("error = %v, want that %s is not there", err, absent)
	}
}

func unwrap(err error) error {
	for {
		u, ok := err.(interface{ Unwrap() error })
		if !ok || os.IsNotExist(err) {
			return err
		}
		err = u.Unwrap()
	}
}

// bcrypt looks at 72 bytes of a password. One of that length is compared whole; a
// longer one, of which a part would be enough, lets nobody in.
func TestLongPasswords(t *testing.T) {
	var long string
	for i := range 50 {
		long += fmt.Sprintf("%02d", i)
	}
	f := newUserFile(t, hashed(t, "anna", long[:72], bcrypt.MinCost), hashed(t, "ben", "short", bcrypt.MinCost), hashed(t, "carl", long[:71], bcrypt.MinCost))
	h := f.open(t, new(bytes.Buffer))
	for _, c := range []struct {
		user, password string
		ok             bool
	}{
		{"anna", long[:72], true}, {"anna", long[:71], false}, {"anna", "x" + long[1:], false}, {"anna", long[:71] + "x", false}, {"anna", long[:71] + "x" + long[72:], false}, {"anna", long[2:], false}, {"anna", long, false}, {"anna", long[:73], false},
		{"ben", "short", true}, {"ben", "short" + long, false}, {"ben", long, false}, {"ben", strings.Repeat("short", 20), false},
		{"carl", long[:71], true}, {"carl", long[:72], false}, {"carl", long, false},
	} {
		for range 2 {
			if got := h.Allows(c.user, c.password); got != c.ok {
				t.Errorf("%s with %d bytes %.20s… may enter: %t, want %t", c.user, len(c.password), c.password, got, c.ok)
			}
		}
	}
}

// quickest is the least time that a refusal takes, which no other work on this
// machine makes longer.
func quickest(t *testing.T, h *front.Htpasswd, user string) time.Duration {
	t.Helper()
	least := time.Hour
	for i := range 5 {
		began := time.Now()
		if h.Allows(user, fmt.Sprint("wrong ", i)) {
			t.Fatalf("%s may enter with any password", user)
		}
		least = min(least, time.Since(began))
	}
	return least
}

// Who tries names learns nothing from the time it takes: a user who does not exist
// is refused as slowly as one who does, whatever the cost of the hashes is. (5 is
// what htpasswd -B has if it is not told another.)
func TestUnknownUsersTakeAsLongAsKnownOnes(t *testing.T) {
	for _, cost := range []int{5, 7} {
		h := newUserFile(t, hashed(t, "anna", "of anna", cost), hashed(t, "ben", "of ben", cost)).open(t, new(bytes.Buffer))
		if !h.Allows("anna", "of anna") {
			t.Fatal("anna may not enter")
		}
		known, unknown := quickest(t, h, "anna"), quickest(t, h, "zoe")
		if ratio := float64(unknown) / float64(known); ratio < 0.33 || ratio > 3 {
			t.Errorf("with hashes of cost %d a user is refused in %v, and one who does not exist in %v", cost, known, unknown)
		}
	}
}

// A password that was right is not computed again for each request of a pull.
func TestRightPasswordIsRemembered(t *testing.T) {
	h := newUserFile(t, hashed(t, "anna", "of anna", 7)).open(t, new(bytes.Buffer))
	began := time.Now()
	h.Allows("anna", "of anna")
	first := time.Since(began)
	least := time.Hour
	for range 5 {
		began := time.Now()
		if !h.Allows("anna", "of anna") {
			t.Fatal("anna may not enter")
		}
		least = min(least, time.Since(began))
	}
	if least > first/5 {
		t.Errorf("the first time takes %v, later ones %v; want them much quicker", first, least)
	}
}

// Many may come at once just when the file has changed: who stands in it all the
// time gets in each time, who never does, never, and the others as it says.
func TestUsersComeWhileTheFileChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		anna, ben := hashed(t, "anna", "of anna", bcrypt.MinCost), hashed(t, "ben", "of ben", bcrypt.MinCost)
		f := newUserFile(t, anna)
		h := f.open(t, new(bytes.Buffer))
		for i := range 4 {
			if i%2 == 0 {
				f.put(t, anna, ben)
			} else {
				f.put(t, anna)
			}
			time.Sleep(time.Second)
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					if !h.Allows("anna", "of anna") || h.Allows("zoe", "of anna") || h.Allows("anna", "of ben") || h.Allows("ben", "of ben") != (i%2 == 0) {
						t.Errorf("after %d changes the wrong ones are let in", i+1)
					}
				})
			}
			wg.Wait()
		}
	})
}
