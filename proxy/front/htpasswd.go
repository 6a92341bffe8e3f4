package front

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/bcrypt"
)

// Htpasswd are users and their passwords in a file of Apache's htpasswd, with
// bcrypt hashes. The file is read again when it has changed; while it cannot be,
// those read before are used.
type Htpasswd struct {
	log  zerolog.Logger
	key  [32]byte      // of the hashes in checked
	busy chan struct{} // holds one for each password that is compared: they must not take all processors

	mu      sync.Mutex
	file    follower
	users   map[string][]byte            // bcrypt hashes
	anyone  []byte                       // the one that takes longest
	checked map[string][sha256.Size]byte // passwords that matched users, hashed; another map with other users
}

// OpenHtpasswd reads the users in a file.
func OpenHtpasswd(path string, log zerolog.Logger) (*Htpasswd, error) {
	h := &Htpasswd{log: log, busy: make(chan struct{}, max(1, runtime.NumCPU()/2))}
	_, _ = rand.Read(h.key[:]) // never fails
	h.file = follower{paths: []string{path}, read: func() error { return h.read(path) }}
	if err := h.file.load(); err != nil {
		return nil, fmt.Errorf("htpasswd: %w", err)
	}
	return h, nil
}

// read takes over the users in a file. h.mu is held, or h is not shared yet.
func (h *Htpasswd) read(path string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	users, err := parseHtpasswd(data)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	h.users = users
	h.anyone = nil
	for _, hash := range users {
		if h.anyone == nil || costOf(hash) > costOf(h.anyone) {
			h.anyone = hash
		}
	}
	h.checked = make(map[string][sha256.Size]byte)
	return nil
}

const (
	bcryptLen   = 60 // bytes of a hash
	passwordLen = 72 // bytes of a password that bcrypt looks at: longer ones would match in part
)

func costOf(hash []byte) int {
	cost, err := bcrypt.Cost(hash)
	if err != nil {
		panic("front: a hash that was read is none: " + err.Error())
	}
	return cost
}

// parseHtpasswd reads lines of user:hash. What it refuses it does not repeat: a
// line may be a password in the wrong place.
func parseHtpasswd(data []byte) (map[string][]byte, error) {
	users := make(map[string][]byte)
	n := 0
	for text := range strings.Lines(string(data)) {
		n++
		line := strings.TrimSpace(text)
		if line == "" || line[0] == '#' {
			continue
		}
		user, hash, ok := strings.Cut(line, ":")
		if !ok || user == "" {
			return nil, fmt.Errorf("line %d is not user:hash", n)
		}
		if _, err := bcrypt.Cost([]byte(hash)); err != nil || len(hash) != bcryptLen {
			return nil, fmt.Errorf("line %d: the hash of %.100q is not bcrypt; make it with htpasswd -B", n, user)
		}
		if _, twice := users[user]; twice {
			return nil, fmt.Errorf("line %d: %.100q stands there twice", n, user)
		}
		users[user] = []byte(hash)
	}
	if len(users) == 0 {
		return nil, errors.New("there is no user in it")
	}
	return users, nil
}

// Allows tells whether a user has this password. bcrypt takes a while, on purpose,
// and a pull has many requests: what matched is remembered, hashed, until the file
// changes.
func (h *Htpasswd) Allows(user, password string) bool {
	if len(password) > passwordLen {
		return false
	}
	m := hmac.New(sha256.New, h.key[:])
	m.Write([]byte(password))
	sum := [sha256.Size]byte(m.Sum(nil))
	h.mu.Lock()
	if err := h.file.follow(); err != nil {
		h.log.Warn().Err(err).Msg("the users could not be read again; those from before may enter")
	}
	hash, known := h.users[user]
	if !known {
		hash = h.anyone // so that it takes the time that a wrong password takes
	}
	checked := h.checked
	was, ok := checked[user]
	h.mu.Unlock()
	if ok && hmac.Equal(was[:], sum[:]) {
		return true
	}
	h.busy <- struct{}{}
	err := bcrypt.CompareHashAndPassword(hash, []byte(password))
	<-h.busy
	if err != nil || !known {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	checked[user] = sum // which nobody looks at any more if there are other users now
	return true
}
