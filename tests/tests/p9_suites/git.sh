# A repository with some history, cloned by links, by a pack, and checked.
git config --global user.name somebody
git config --global user.email somebody@example.org
git config --global init.defaultBranch main
export GIT_PAGER=cat GIT_AUTHOR_DATE=2026-01-01T00:00:00Z GIT_COMMITTER_DATE=2026-01-01T00:00:00Z
cd /mnt
git init -q one
cd one
cp -r /usr/lib/python3.13/json /usr/lib/python3.13/re .
git add .
git commit -qm first
rm -r json
mv re other
echo more >>other/__init__.py
git add -A
git commit -qm second
git branch side HEAD~1
git status --porcelain
git clone -q . ../linked
git clone -q --no-local . ../packed
cd ../packed
git checkout -q side
git checkout -q main
git gc -q
for repository in one linked packed; do
    git -C "/mnt/$repository" fsck --full --strict --no-progress
    git -C "/mnt/$repository" status --porcelain
    git -C "/mnt/$repository" log --format=%H
done
