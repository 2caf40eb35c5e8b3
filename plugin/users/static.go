/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package users

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
)

// Group is a group that an administrator lists.
type Group struct {
	// GID is the group's ID. There is no default.
	GID *int64 `toml:"gid"`
	// Members are the names of the users who have the group as a supplementary
	// one.
	Members []string `toml:"members"`
}

// Static makes the two files of an administrator's list of users, each with
// "uid" or "uid:gid" (without gid it is 0, as for a user who is in no
// /etc/passwd), and of groups. The user and the group root (0) are there
// without being listed. The same list gives the same files.
//
// All that is wrong with the list is reported at once; each error names the
// entry and what is accepted, and wraps errdefs.ErrInvalidArgument.
func Static(users map[string]string, groups map[string]Group) (Files, error) {
	var errs []error
	refuse := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...))
	}

	var passwd, group strings.Builder
	if _, ok := users["root"]; !ok {
		passwd.WriteString("root:x:0:0::/:\n")
	}
	for _, name := range slices.Sorted(maps.Keys(users)) {
		id := users[name]
		if why := badName(name); why != "" {
			refuse("users has the user %q: %s", name, why)
		}
		uid, gid, found := strings.Cut(id, ":")
		if !found {
			gid = "0"
		}
		if !isID(uid) || !isID(gid) {
			refuse("users has %q = %q: want \"uid\" or \"uid:gid\", decimal numbers from 0 to %d", name, id, math.MaxInt32)
		}
		fmt.Fprintf(&passwd, "%s:x:%s:%s::/:\n", name, uid, gid)
	}

	if _, ok := groups["root"]; !ok {
		group.WriteString("root:x:0:\n")
	}
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		g := groups[name]
		if why := badName(name); why != "" {
			refuse("groups has the group %q: %s", name, why)
		}
		switch {
		case g.GID == nil:
			refuse("groups.%s has no gid: give it one, as in { gid = 4, members = [\"nginx\"] }", name)
			continue
		case *g.GID < 0 || *g.GID > math.MaxInt32:
			refuse("groups.%s has gid = %d: want a number from 0 to %d", name, *g.GID, math.MaxInt32)
		}
		for _, m := range g.Members {
			if _, ok := users[m]; !ok && m != "root" {
				refuse("groups.%s has the member %q, who is not among users: add the user or remove the member", name, m)
			}
		}
		fmt.Fprintf(&group, "%s:x:%d:%s\n", name, *g.GID, strings.Join(g.Members, ","))
	}
	if err := errors.Join(errs...); err != nil {
		return Files{}, err
	}
	return Files{Passwd: []byte(passwd.String()), Group: []byte(group.String())}, nil
}

// badName says why a name cannot stand in the files, or be told from a number
// by containerd (pkg/oci/spec_opts.go, WithUser).
func badName(name string) string {
	if _, err := strconv.Atoi(name); name == "" || err == nil || errors.Is(err, strconv.ErrRange) {
		return "want a name, numbers need no entry"
	}
	if strings.HasPrefix(name, "#") || strings.ContainsAny(name, ":,\\") ||
		strings.ContainsFunc(name, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }) {
		return "want a name without spaces, colons, commas, backslashes, and no # in front"
	}
	return ""
}

func isID(s string) bool {
	n, err := strconv.ParseUint(s, 10, 31)
	return err == nil && strconv.FormatUint(n, 10) == s
}
