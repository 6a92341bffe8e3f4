package diff

import (
	"regexp"
	"slices"
	"strings"
)

// Images carry secrets that were never meant to be published, in variables, in
// arguments, in the steps they were built by. A diff is stored and shown to
// people: it tells that they changed, not what they are. What looks like one is
// masked; it is better to mask too much.

const hidden = "(masked)"

// secretWords name what holds a secret when they stand alone in a name, between
// separators; secretParts wherever they stand.
var (
	secretWords = map[string]bool{"auth": true, "authorization": true, "dsn": true, "key": true, "keys": true, "pass": true, "pat": true, "private": true, "pw": true, "pwd": true}
	secretParts = []string{"accesskey", "apikey", "connectionstring", "credential", "passcode", "passphrase", "passwd", "password", "secret", "token"}
)

var (
	assignment   = regexp.MustCompile(`([A-Za-z0-9_.-]+)(\s*[=:]\s*)("(?:[^"\\]|\\.)*"|'[^']*'|[^\s"',;&|)}\]]+)`)
	flagAndValue = regexp.MustCompile(`(^|\s)(--?[A-Za-z0-9_.-]+)(\s+)("[^"]*"|'[^']*'|[^\s"',;&|-][^\s"',;&|]*)`)
	scheme       = regexp.MustCompile(`(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{4,}`)
	userInfo     = regexp.MustCompile(`://[^/\s"'@]+@`)
)

// isSecret tells the names of variables, labels and flags whose values are
// nobody's business.
func isSecret(name string) bool {
	words := strings.FieldsFunc(strings.ToLower(name), func(r rune) bool { return r == '-' || r == '_' || r == '.' || r == '/' || r == ' ' })
	joined := strings.Join(words, "")
	return slices.ContainsFunc(words, func(w string) bool { return secretWords[w] }) ||
		slices.ContainsFunc(secretParts, func(part string) bool { return strings.Contains(joined, part) })
}

// masked is the value of a key, nil if it is not there. Two secrets that differ
// are shown alike.
func masked(key, value string, there bool) *string {
	switch {
	case !there:
		return nil
	case value != "" && isSecret(key):
		value = hidden
	default:
		value = mask(value)
	}
	return &value
}

// mask takes secrets out of a text: assignments, flags with their values,
// authorizations, and users in addresses.
func mask(s string) string {
	s = userInfo.ReplaceAllString(s, "://"+hidden+"@")
	s = scheme.ReplaceAllString(s, "$1 "+hidden)
	s = assignment.ReplaceAllStringFunc(s, func(m string) string {
		g := assignment.FindStringSubmatch(m)
		if !isSecret(g[1]) || strings.HasPrefix(g[3], "//") {
			return m
		}
		return g[1] + g[2] + hidden
	})
	return flagAndValue.ReplaceAllStringFunc(s, func(m string) string {
		g := flagAndValue.FindStringSubmatch(m)
		if !isSecret(g[2]) {
			return m
		}
		return g[1] + g[2] + g[3] + hidden
	})
}

// maskAll masks the items of a command: also one that follows a flag for it.
func maskAll(items []string) []string {
	out := make([]string, len(items))
	for i, item := range items {
		out[i] = mask(item)
		if i > 0 && strings.HasPrefix(items[i-1], "-") && !strings.ContainsAny(items[i-1], "= ") && isSecret(items[i-1]) && item != "" && item[0] != '-' {
			out[i] = hidden
		}
	}
	return out
}
