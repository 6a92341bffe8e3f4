package oci

import (
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// A View is a moment of the past that a request asks about: a time, or the place
// right after an entry of the log.
type View struct {
	Time  time.Time // zero when it is an entry
	Index int64

	// Prefix is what the path of a repository's requests begins with: "/v2/" of
	// those without a view.
	Prefix string
}

// CutBase takes a view off the beginning of a path, where a client has it as the
// base of a mirror: /asof/<time>/v2/... and /at/<index>/v2/... It is nil if there is
// none.
func CutBase(path string) (rest string, v *View, err error) {
	word, point, rest, ok := cutView(strings.TrimPrefix(path, "/"))
	if !ok || rest != "v2" && !strings.HasPrefix(rest, "v2/") {
		return path, nil, nil
	}
	if v, err = parseView(word, point); err != nil {
		return "", nil, err
	}
	v.Prefix = "/" + word + "/" + point + "/v2/"
	return "/" + rest, v, nil
}

// CutName takes a view off the beginning of a repository's name, where a reference
// has it: /v2/asof/<time>/<name>/... and /v2/at/<index>/<name>/...
func CutName(path string) (rest string, v *View, err error) {
	after, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return path, nil, nil
	}
	word, point, rest, ok := cutView(after)
	if _, _, _, named := split(rest, true); !ok || !named {
		return path, nil, nil // a repository that only begins like this
	}
	if v, err = parseView(word, point); err != nil {
		return "", nil, err
	}
	v.Prefix = "/v2/" + word + "/" + point + "/"
	return "/v2/" + rest, v, nil
}

func cutView(path string) (word, point, rest string, ok bool) {
	word, rest, ok = strings.Cut(path, "/")
	if !ok || word != "asof" && word != "at" {
		return "", "", "", false
	}
	point, rest, ok = strings.Cut(rest, "/")
	return word, point, rest, ok
}

func parseView(word, point string) (*View, error) {
	bad := func(want string) error {
		return &Error{http.StatusBadRequest, NameInvalid, fmt.Sprintf("%s/%.100s: want %s", word, point, want), nil}
	}
	if word == "at" {
		n, err := strconv.ParseInt(point, 10, 64)
		if err != nil || n < 0 || strconv.FormatInt(n, 10) != point {
			return nil, bad("the index of an entry of the log, such as at/184223")
		}
		return &View{Index: n}, nil
	}
	t, err := ParseTime(point)
	if err != nil {
		return nil, bad("a date or a time in UTC, such as asof/2026-07-01 or asof/2026-07-01t12-30-00z")
	}
	return &View{Time: t}, nil
}

var timeGrammar = regexp.MustCompile(`^\d{4}-\d{2}-\d{2}(t\d{2}-\d{2}-\d{2}z)?$`)

// ParseTime reads a time as the name of a repository can have it: 2026-07-01, which
// is the first second of that day in UTC, or 2026-07-01t12-30-00z.
func ParseTime(s string) (time.Time, error) {
	if !timeGrammar.MatchString(s) {
		return time.Time{}, fmt.Errorf("%.100q is not a time such as 2026-07-01 or 2026-07-01t12-30-00z", s)
	}
	if !strings.Contains(s, "t") {
		return time.Parse(time.DateOnly, s)
	}
	return time.Parse("2006-01-02t15-04-05z", s)
}
